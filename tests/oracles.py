"""References that share no code with ``unroll``: differences, a naive loop, plain optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call

Parameters = dict[str, Tensor]
Step = Callable[[Parameters, Parameters, Any], tuple[Parameters, Any]]


def central_difference(
    f: Callable[[float], float], step: float = 0.02, levels: int = 14, accuracy: float = 1e-11
) -> float:
    """Return ``f'(0)`` by central differences of shrinking step, extrapolated (Ridders 1982).

    The step is chosen by the agreement of the differences with each other alone.
    """
    best, best_error = float("nan"), float("inf")
    previous: list[float] = []
    for level in range(levels):
        h = step / 2**level
        row = [(f(h) - f(-h)) / (2 * h)]
        for order, coarser in enumerate(previous, start=1):
            finer = row[-1]
            row.append(finer + (finer - coarser) / (4**order - 1))
            error = max(abs(row[-1] - finer), abs(row[-1] - coarser))
            if error < best_error:
                best, best_error = row[-1], error
        if best_error <= accuracy * abs(best):
            break
        previous = row
    return best


def relative_error(
    f: Callable[[Tensor], Tensor], at: Tensor, gradient: Tensor, directions: int = 3
) -> float:
    """Compare ``gradient`` with central differences of ``f`` along random unit directions.

    Returns the largest deviation over the largest directional derivative.
    """
    differences, products = [], []
    for v in torch.randn(directions, *at.shape, dtype=at.dtype).to(at.device):
        v = v / v.norm()

        def along(t: float, v: Tensor = v) -> float:
            with torch.no_grad():
                return float(f(at + t * v))

        differences.append(central_difference(along))
        products.append((gradient * v).sum().item())
    worst = max(abs(d - p) for d, p in zip(differences, products, strict=True))
    return float(worst / max(abs(d) for d in differences))


def call(discriminator: nn.Module, theta: Parameters) -> Callable[[Any], Any]:
    """Return D at ``theta`` as a function of a batch: a tensor, a tuple or a mapping."""

    def d(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return functional_call(discriminator, theta, (), dict(batch))
        return functional_call(discriminator, theta, batch)

    return d


def naive_surrogate(
    discriminator: nn.Module,
    step: Step,
    objective: Any,
    fake: Any,
    real: Any,
    minibatches: Iterable[tuple[Any, Any]],
    *,
    average: bool = False,
    detach: bool = False,
) -> Tensor:
    """Return ``f_K`` of Eq. 9 (or the mean of f_1..f_K) by the loop that one would write first."""
    theta = {n: p.detach().clone().requires_grad_() for n, p in discriminator.named_parameters()}
    state, values = None, []
    for fake_k, real_k in minibatches:
        loss = objective.discriminator_loss(call(discriminator, theta), fake_k, real_k)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta, state = step(theta, dict(zip(theta, gradients, strict=True)), state)
        if detach:
            theta = {n: p.detach().requires_grad_() for n, p in theta.items()}
        values.append(objective.generator_loss(call(discriminator, theta), fake, real))
    if not values:
        values.append(objective.generator_loss(call(discriminator, theta), fake, real))
    return torch.stack(values).mean() if average else values[-1]


def sgd(lr: float, momentum: float = 0.0, *, decay: float = 0.0, nesterov: bool = False) -> Step:
    """Return gradient descent with momentum and weight decay, as a function."""

    def step(theta: Parameters, g: Parameters, state: Any) -> tuple[Parameters, Any]:
        g = {n: g[n] + decay * theta[n] for n in theta}
        trace = {n: g[n] + (momentum * state[n] if state else 0.0) for n in theta}
        move = {n: g[n] + momentum * trace[n] for n in theta} if nesterov else trace
        return {n: theta[n] - lr * move[n] for n in theta}, trace

    return step


def sgd_in_groups(rates: list[float]) -> Step:
    """Return gradient descent with a learning rate for each parameter, as a function."""

    def step(theta: Parameters, g: Parameters, _: Any) -> tuple[Parameters, Any]:
        pairs = zip(theta.items(), rates, strict=True)
        return {n: p - lr * g[n] for (n, p), lr in pairs}, None

    return step


def adam(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    decay: float = 0.0,
    amsgrad: bool = False,
) -> Step:
    """Return Adam (AdamW with ``decay``), as a function; its root has slope 0 at zero."""
    b1, b2 = betas

    def root(v: Tensor) -> Tensor:
        return torch.where(v == 0, torch.zeros_like(v), torch.where(v == 0, 1.0, v).sqrt())

    def step(theta: Parameters, g: Parameters, state: Any) -> tuple[Parameters, Any]:
        zeros = {n: torch.zeros_like(p) for n, p in theta.items()}
        m, v, top, t = state or (zeros, zeros, zeros, 0)
        m = {n: b1 * m[n] + (1 - b1) * g[n] for n in theta}
        v = {n: b2 * v[n] + (1 - b2) * g[n] ** 2 for n in theta}
        top = {n: torch.where(v[n] > top[n], v[n], top[n]) for n in theta} if amsgrad else v
        t += 1
        hat = {
            n: m[n] / (1 - b1**t) / (root(top[n] / (1 - b2**t)) + eps) + decay * theta[n]
            for n in theta
        }
        return {n: theta[n] - lr * hat[n] for n in theta}, (m, v, top, t)

    return step


def transformed(transformation: Any, state: Any = None) -> Step:
    """Return a torchopt transformation as a function, from ``state`` if it is given."""
    initial = state

    def step(theta: Parameters, g: Parameters, state: Any) -> tuple[Parameters, Any]:
        p = tuple(theta.values())
        state = state or initial or transformation.init(p)
        updates, state = transformation.update(tuple(g.values()), state, params=p, inplace=False)
        moved = torchopt.apply_updates(p, updates, inplace=False)
        return dict(zip(theta, moved, strict=True)), state

    return step
