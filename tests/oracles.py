"""References that share no code with ``unroll``: differences, naive loops, losses, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import logsigmoid

import unroll

Sum = type(unroll.Minimax() + unroll.R1(1.0))

Parameters = dict[str, Tensor]
Step = Callable[[Parameters, Parameters, Any], tuple[Parameters, Any]]


def plain_difference(f: Callable[[float], float], h: float = 1e-5) -> float:
    """Return ``f'(0)`` by one central difference, where ``f`` is smooth."""
    return (f(h) - f(-h)) / (2 * h)


def central_difference(
    f: Callable[[float], float], step: float = 0.02, levels: int = 14, accuracy: float = 1e-11
) -> float:
    """Return ``f'(0)`` by central differences of shrinking step, extrapolated (Ridders 1982).

    The step is chosen by the agreement of the differences with each other, and by how much of the
    noise of ``f`` is in them: Adam makes 1e-11 of the round-off in a gradient that is zero, and
    small steps then agree by chance.
    """
    close = [f(k * 1e-13) for k in range(-2, 3)]
    bends = [a - 2 * b + c for a, b, c in zip(close, close[1:], close[2:], strict=False)]
    noise = max(map(abs, bends)) / 2
    best, best_error = float("nan"), float("inf")
    previous: list[float] = []
    for level in range(levels):
        h = step / 2**level
        row = [plain_difference(f, h)]
        for order, coarser in enumerate(previous, start=1):
            finer = row[-1]
            row.append(finer + (finer - coarser) / (4**order - 1))
            error = max(abs(row[-1] - finer), abs(row[-1] - coarser), noise / h)
            if error < best_error:
                best, best_error = row[-1], error
        if best_error <= max(accuracy * abs(best), 2 * noise / h):  # no smaller step does better
            break
        previous = row
    return best


def relative_error(
    f: Callable[[Tensor], Tensor],
    at: Tensor,
    gradient: Tensor,
    directions: int = 3,
    slope: Callable[[Callable[[float], float]], float] = central_difference,
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

        differences.append(slope(along))
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


# --- every optimizer of torch.optim, as its paper has it ------------------------------------------
# A learning rate may be a float32 tensor: then torch rounds what it computes from that alone.


def root(x: Tensor) -> Tensor:
    """Return the square root, with slope 0 at 0."""
    return torch.where(x == 0, torch.zeros_like(x), torch.where(x == 0, 1.0, x).sqrt())


def _rounded(x: float) -> float:
    """Return what torch's plain step leaves of a number that it keeps as a float32 tensor."""
    return torch.tensor(float(x)).item()


def _adam(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    t, m, v, top = s or (0, 0.0, 0.0, 0.0)
    (b1, b2), t = map(float, h["betas"]), t + 1
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    top = torch.where(v > top, v, top) if h["amsgrad"] else v
    lr = h["lr"] / (1 - b1**t)
    return p - lr * m / (root(top / (1 - b2**t)) + h["eps"]), (t, m, v, top)


def _sgd(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    b = h["momentum"]
    trace = g if s is None else b * s + (1 - h["dampening"]) * g
    return p - h["lr"] * (g + b * trace if h["nesterov"] else trace if b else g), trace


def _nadam(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    t, m, v, product = s or (0, 0.0, 0.0, 1.0)
    (b1, b2), t = map(float, h["betas"]), t + 1
    mu, following = (b1 * (1 - 0.5 * 0.96 ** (k * h["momentum_decay"])) for k in (t, t + 1))
    product = _rounded(_rounded(product) * _rounded(mu))
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    now = h["lr"] * (1 - mu) / (1 - product) * g
    ahead = h["lr"] * following / (1 - product * following) * m
    return p - (now + ahead) / (root(v / (1 - b2**t)) + h["eps"]), (t, m, v, product)


def _radam(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    t, m, v = s or (0, 0.0, 0.0)
    (b1, b2), t = map(float, h["betas"]), t + 1
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / (1 - b2**t)
    move = m / (1 - b1**t)
    if length > 5:
        r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        move = move * (r * (1 - b2**t)) ** 0.5 / (root(v) + h["eps"])
    return p - h["lr"] * move, (t, m, v)


def _adamax(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    t, m, u = s or (0, 0.0, torch.zeros_like(p))
    (b1, b2), t = map(float, h["betas"]), t + 1
    m, u = b1 * m + (1 - b1) * g, torch.maximum(b2 * u, g.abs() + h["eps"])
    return p - h["lr"] / (1 - b1**t) * m / u, (t, m, u)


def _rmsprop(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    v, mean, trace = s or (0.0, 0.0, 0.0)
    a = h["alpha"]
    v, mean = a * v + (1 - a) * g**2, a * mean + (1 - a) * g
    trace = h["momentum"] * trace + g / (root(v - mean**2 if h["centered"] else v) + h["eps"])
    return p - h["lr"] * trace, (v, mean, trace)


def _adagrad(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    t, total = s or (0, h["initial_accumulator_value"])
    total = total + g**2
    lr = h["lr"] / (1 + t * h["lr_decay"])
    return p - lr * g / (root(total) + h["eps"]), (t + 1, total)


def _adadelta(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    v, moved = s or (0.0, 0.0)
    rho, eps = h["rho"], h["eps"]
    v = rho * v + (1 - rho) * g**2
    move = (moved + eps) ** 0.5 / (v + eps) ** 0.5 * g
    return p - h["lr"] * move, (v, rho * moved + (1 - rho) * move**2)


def _asgd(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    t, eta = s or (1, _rounded(h["lr"]))
    count = torch.tensor(float(t)) if h["foreach"] else t  # in float32
    following = _rounded(h["lr"] / (1 + h["lambd"] * h["lr"] * count) ** h["alpha"])
    return p * (1 - h["lambd"] * eta) - eta * g, (t + 1, following)


def _rprop(p: Tensor, g: Tensor, s: Any, h: Mapping[str, Any]) -> tuple[Tensor, Any]:
    size, last = s or (torch.full_like(p, h["lr"]), torch.zeros_like(p))
    (shrink, grow), (smallest, largest) = h["etas"], h["step_sizes"]
    size = torch.where(g * last > 0, size * grow, torch.where(g * last < 0, size * shrink, size))
    size, g = size.clamp(smallest, largest), torch.where(g * last < 0, 0.0, g)
    return p - g.sign() * size, (size, g)


RULES = {
    "SGD": _sgd, "Adam": _adam, "AdamW": _adam, "NAdam": _nadam, "RAdam": _radam,
    "Adamax": _adamax, "RMSprop": _rmsprop, "Adagrad": _adagrad, "Adadelta": _adadelta,
    "ASGD": _asgd, "Rprop": _rprop,
}  # fmt: skip


def textbook(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> Step:
    """Return a ``torch.optim`` optimizer before its first step, as a function.

    Only its hyper-parameters are read. Parameters without a gradient are skipped.
    """
    rule = RULES[type(optimizer).__name__]
    names = {id(p): name for name, p in parameters.items()}
    groups = {
        names[id(p)]: h for h in optimizer.param_groups for p in h["params"] if id(p) in names
    }

    def step(theta: Parameters, g: Parameters, state: Any) -> tuple[Parameters, Any]:
        theta, state = dict(theta), dict(state or {})
        for n in g.keys() & groups.keys():
            h = groups[n]
            gradient = -g[n] if h.get("maximize") else g[n]
            if h.get("weight_decay") and h.get("decoupled_weight_decay"):
                theta[n] = theta[n] * (1 - h["lr"] * h["weight_decay"])
            elif h.get("weight_decay"):
                gradient = gradient + h["weight_decay"] * theta[n]
            theta[n], state[n] = rule(theta[n], gradient, state.get(n), h)
        return theta, state

    return step


# --- the games, as their papers have them ---------------------------------------------------------


class Game:
    """The game of an objective of the library; random numbers are drawn in ``draws``.

    D is called in the order in which the objective calls it, so that random draws are the same.
    """

    def __init__(self, objective: Any, draws: torch.dtype) -> None:
        self.objective, self.draws = objective, draws

    def discriminator_loss(self, d: Any, fake: Tensor, real: Tensor) -> Tensor:
        """Return what D minimises."""
        o = self.objective
        if isinstance(o, Sum):
            first, second = Game(o.first, self.draws), Game(o.second, self.draws)
            loss = first.discriminator_loss(d, fake, real)
            return loss + second.discriminator_loss(d, fake, real)
        if not type(o).__module__.startswith("unroll."):
            own: Tensor = o.discriminator_loss(d, fake, real)
            return own
        if isinstance(o, unroll.R1):
            return 0.5 * o.gamma * _slopes(d, real).mean()
        if isinstance(o, unroll.R2):
            return 0.5 * o.gamma * _slopes(d, fake).mean()
        if isinstance(o, unroll.GradientPenalty):
            share = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=self.draws).to(real)
            slopes = _slopes(d, share * real + (1 - share) * fake)
            return o.weight * ((root(slopes) - 1) ** 2).mean()
        on_real: Tensor = d(real)
        on_fake: Tensor = d(fake)
        if isinstance(o, (unroll.Minimax, unroll.NonSaturating)):
            return -logsigmoid(on_real).mean() - logsigmoid(-on_fake).mean()
        if isinstance(o, unroll.LeastSquares):
            return ((on_real - 1) ** 2).mean() / 2 + (on_fake**2).mean() / 2
        if isinstance(o, unroll.Hinge):
            return (1 - on_real).clamp_min(0).mean() + (1 + on_fake).clamp_min(0).mean()
        if isinstance(o, unroll.Wasserstein):
            return on_fake.mean() - on_real.mean()
        if isinstance(o, unroll.RelativisticPairing):
            return -logsigmoid(on_real - on_fake).mean()
        if isinstance(o, unroll.RelativisticAverage):
            return (
                -logsigmoid(on_real - on_fake.mean()).mean()
                - logsigmoid(on_real.mean() - on_fake).mean()
            )
        is_real = o.real_label * torch.ones_like(on_real)
        is_fake = o.fake_label * torch.ones_like(on_fake)
        both = o.loss_fn(on_real, is_real) + o.loss_fn(on_fake, is_fake)
        weighted: Tensor = o.weight * both
        return weighted

    def generator_loss(self, d: Any, fake: Tensor, real: Tensor) -> Tensor:
        """Return what G minimises."""
        o = self.objective
        if isinstance(o, Sum):
            return Game(o.first, self.draws).generator_loss(d, fake, real)
        if not type(o).__module__.startswith("unroll."):
            own: Tensor = o.generator_loss(d, fake, real)
            return own
        if isinstance(o, (unroll.Minimax, unroll.RelativisticPairing, unroll.RelativisticAverage)):
            on_real = d(real)
        on_fake: Tensor = d(fake)
        if isinstance(o, unroll.Minimax):
            value: Tensor = logsigmoid(on_real).mean() + logsigmoid(-on_fake).mean()
        elif isinstance(o, unroll.NonSaturating):
            value = -logsigmoid(on_fake).mean()
        elif isinstance(o, unroll.LeastSquares):
            value = ((on_fake - 1) ** 2).mean() / 2
        elif isinstance(o, (unroll.Hinge, unroll.Wasserstein)):
            value = -on_fake.mean()
        elif isinstance(o, unroll.RelativisticPairing):
            value = -logsigmoid(on_fake - on_real).mean()
        elif isinstance(o, unroll.RelativisticAverage):
            value = (
                -logsigmoid(on_fake - on_real.mean()).mean()
                - logsigmoid(on_fake.mean() - on_real).mean()
            )
        else:
            value = o.loss_fn(on_fake, o.real_label * torch.ones_like(on_fake))
        return value


def _slopes(d: Any, x: Tensor) -> Tensor:
    """Return the squared norm of dD/dx of each sample."""
    point = 1 * x if x.requires_grad else x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(d(point).sum(), point, create_graph=True)
    return (slope**2).flatten(1).sum(1)
