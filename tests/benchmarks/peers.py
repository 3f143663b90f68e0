"""The peers: one generator step (f_K and its gradient in theta_G), as a user would write it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torchopt
from torch import Tensor
from torch.func import functional_call
from torchopt.pytree import tree_leaves

import unroll
from tests.benchmarks.networks import BETAS, EPS, EPS_ROOT, LR, OBJECTIVE, STEPS, Game

Step = Callable[[], tuple[Tensor, ...]]


def live_adam(game: Game, lr: float = LR) -> torch.optim.Adam:
    """Return the optimizer of a D in the midst of its training."""
    optimizer = torch.optim.Adam(game.discriminator.parameters(), lr, BETAS, EPS)
    for p, mu, nu in zip(game.discriminator.parameters(), *game.moments, strict=True):
        step = torch.tensor(float(STEPS))
        optimizer.state[p] = {"step": step, "exp_avg": mu.clone(), "exp_avg_sq": nu.clone()}
    return optimizer


def live_state(state: Any, game: Game, order: Iterable[Tensor]) -> Any:
    """Return torchopt's Adam state with the same moments, for parameters in that order."""
    places: dict[Tensor, int] = {p: i for i, p in enumerate(game.discriminator.parameters())}
    indices = [places[p] for p in order]
    mu, nu = ([moment[i] for i in indices] for moment in game.moments)
    count = [torch.full((), STEPS) for _ in mu]
    return tuple(
        part._replace(mu=mu, nu=nu, count=count) if hasattr(part, "nu") else part for part in state
    )


def plain(game: Game, k: int) -> Step:
    """Return the unit: K training steps of D, or at K = 0 the generator's ordinary step."""
    d, fake = game.discriminator, game.generator(game.z).detach()
    optimizer = live_adam(game, lr=0.0)  # the work, without the drift

    def train() -> tuple[Tensor, ...]:
        for _ in range(k):
            optimizer.zero_grad()
            OBJECTIVE.discriminator_loss(d, fake, game.real).backward()
            optimizer.step()
        return ()

    def ordinary() -> tuple[Tensor, ...]:
        value = OBJECTIVE.generator_loss(d, game.generator(game.z), game.real)
        return torch.autograd.grad(value, tuple(game.generator.parameters()))

    return train if k else ordinary


def unrolled(game: Game, k: int, **options: Any) -> Step:
    """Return this library's step."""
    optimizer = live_adam(game)
    loss = unroll.UnrolledGeneratorLoss(
        game.discriminator, optimizer, OBJECTIVE, unroll_steps=k, **options
    )

    def step() -> tuple[Tensor, ...]:
        value = loss(game.generator(game.z), game.real)
        return torch.autograd.grad(value, tuple(game.generator.parameters()))

    return step


def by_hand(game: Game, k: int) -> Step:
    """Return the step of a loop over torchopt's and PyTorch's functional pieces."""
    d = game.discriminator
    impl = torchopt.adam(LR, BETAS, EPS, eps_root=EPS_ROOT)
    names = [name for name, _ in d.named_parameters()]

    def step() -> tuple[Tensor, ...]:
        fake = game.generator(game.z)
        theta = tuple(p.detach().clone().requires_grad_() for p in d.parameters())
        buffers = {name: b.clone() for name, b in d.named_buffers()}

        def at(x: Tensor) -> Tensor:
            output: Tensor = functional_call(
                d, {**dict(zip(names, theta, strict=True)), **buffers}, (x,)
            )
            return output

        state = live_state(impl.init(theta), game, d.parameters())
        for _ in range(k):
            loss = OBJECTIVE.discriminator_loss(at, fake, game.real)
            gradients = torch.autograd.grad(loss, theta, create_graph=True)
            updates, state = impl.update(gradients, state, params=theta, inplace=False)
            theta = torchopt.apply_updates(theta, updates, inplace=False)
        value = OBJECTIVE.generator_loss(at, fake, game.real)
        return torch.autograd.grad(value, tuple(game.generator.parameters()))

    return step


def meta_adam(game: Game, k: int) -> Step:
    """Return the step of torchopt's own way for modules."""
    d = game.discriminator
    optimizer = torchopt.MetaAdam(d, LR, BETAS, EPS, eps_root=EPS_ROOT)
    containers: Any = optimizer.param_containers_groups
    (container,) = containers
    leaves: list[Tensor] = tree_leaves(container)  # by name, not as D has them
    optimizer.state_groups = [live_state(optimizer.impl.init(container), game, leaves)]

    def step() -> tuple[Tensor, ...]:
        fake = game.generator(game.z)
        saved = torchopt.extract_state_dict(d)
        saved_optimizer = torchopt.extract_state_dict(optimizer)
        for _ in range(k):
            optimizer.step(OBJECTIVE.discriminator_loss(d, fake, game.real))
        value = OBJECTIVE.generator_loss(d, fake, game.real)
        gradients = torch.autograd.grad(value, tuple(game.generator.parameters()))
        torchopt.recover_state_dict(d, saved)
        torchopt.recover_state_dict(optimizer, saved_optimizer)
        return gradients

    return step


def with_higher(game: Game, k: int) -> Step:
    """Return the step with Facebook's higher, which nobody maintains any more."""
    import higher

    d, optimizer = game.discriminator, live_adam(game)

    def step() -> tuple[Tensor, ...]:
        fake = game.generator(game.z)
        with higher.innerloop_ctx(d, optimizer) as (ahead, ahead_optimizer):
            for _ in range(k):
                ahead_optimizer.step(OBJECTIVE.discriminator_loss(ahead, fake, game.real))
            value = OBJECTIVE.generator_loss(ahead, fake, game.real)
            return torch.autograd.grad(value, tuple(game.generator.parameters()))

    return step


Build = Callable[[Game, int], Step]
PLAIN, UNROLL, CHECKPOINT = "plain", "unroll", "unroll, checkpoint"
COMPILE, JAX = "unroll, compile", "JAX, optax"
RIVALS: dict[str, Build] = {
    "by hand, torchopt": by_hand,
    "torchopt.MetaAdam": meta_adam,
    "higher": with_higher,
}
OWN: dict[str, Build] = {
    UNROLL: unrolled,
    CHECKPOINT: partial(unrolled, checkpoint=True),
    COMPILE: partial(unrolled, compile=True),
}
TORCH_PEERS: dict[str, Build] = {PLAIN: plain, **OWN, **RIVALS}
PEERS = (*TORCH_PEERS, JAX)


def installed(package: str) -> str:
    """Return the version of a package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def absent() -> dict[str, str]:
    """Return the PyTorch peers that cannot run here, and why."""
    reasons = {"betty": "has no exact derivative through steps that leave D alone: see the page"}
    if installed("higher") == "absent":
        reasons["higher"] = "pip install higher"
    if "compile" not in inspect.signature(unroll.UnrolledGeneratorLoss).parameters:
        reasons[COMPILE] = "UnrolledGeneratorLoss has no compile= yet"
    return reasons


def build(peer: str, game: Game, k: int) -> Step:
    """Return a peer's step on networks of its own."""
    return TORCH_PEERS[peer](deepcopy(game), k)
