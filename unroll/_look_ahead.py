"""The heart: one look-ahead step of the discriminator, K of them, and f at their end.

A step is a pure function from a point to the next, and everything else is a function around it
(:mod:`unroll._modes`). A step is differentiable where one of its inputs requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unroll._autograd_fixes import inner_gradients
from unroll._functional import (
    Batch,
    Functional,
    FunctionalDiscriminator,
    Pair,
    map_tensors,
    tensors,
    views,
)
from unroll._objectives import Objective
from unroll._optimizers import InnerOptimizer
from unroll._validation import (
    Mapped,
    check_gradients_found,
    check_scalar,
    check_unchanged,
    mapped,
    outside_autograd,
)


class Point(NamedTuple):
    """Where the look-ahead stands after k steps."""

    parameters: Mapping[str, Tensor]  # theta_D^k
    buffers: Mapping[str, Tensor]
    optimizer_state: Any
    loss: Tensor  # D's at theta_D^{k-1}, detached; NaN at theta_D^0


Gradients = dict[str, Tensor]
Step = Callable[[Point, Pair, Any], Point]  # given a point, (fake, real) and optimizer settings
Value = Callable[[Point, Pair], Tensor]  # f at a point, on (fake, real)
LookAhead = Callable[..., tuple[list[Point], list[Tensor]]]  # look_ahead, of some step
Mean = Callable[[Gradients, Mapping[str, Tensor], Pair], Gradients]


@dataclass(frozen=True)
class Game:
    """What a step consists of besides tensors."""

    discriminator: Functional
    optimizer: InnerOptimizer
    objective: Objective
    moving: frozenset[str]  # names of the parameters that take steps
    mean: Mean | None  # of their gradients, over ranks
    transform_gradients: Mapped | None
    project: Mapped | None


def start(discriminator: Functional, optimizer_state: Any = None) -> Point:
    """Return theta_D^0 = theta_D (Eq. 6), in copies."""
    parameters = {name: p.detach().clone() for name, p in discriminator.parameters.items()}
    buffers = {name: b.detach().clone() for name, b in discriminator.buffers.items()}
    return Point(parameters, buffers, optimizer_state, torch.full((), torch.nan))


def look_ahead(
    step: Step, point: Point, pairs: Sequence[Pair], settings: Any, *, every: bool = False
) -> tuple[list[Point], list[Tensor]]:
    """Return theta_D^K (Eq. 8), or ``every`` one of theta_D^1..K, and D's loss before each step."""
    points: list[Point] = []
    losses: list[Tensor] = []
    for pair in pairs:
        point = step(point, pair, settings)
        points = [*points, point] if every else [point]
        losses.append(point.loss)
    return points or [point], losses


def inner_step(game: Game) -> Step:
    """Return the step theta_D^{k+1} = theta_D^k + eta df/dtheta_D^k (Eq. 7)."""

    def step(point: Point, pair: Pair, settings: Any) -> Point:
        create_graph = any(t.requires_grad for t in tensors((point, pair, settings)))
        theta = leaves(point.parameters, game.moving)
        found = differentiate(game, theta, point.buffers, pair, create_graph)
        loss, gradients, buffers = found
        if game.mean is not None:
            moving = {name: p for name, p in theta.items() if name in game.moving}
            with torch.enable_grad():
                gradients = game.mean(gradients, moving, pair)
        check_gradients_found(gradients)
        parameters, state = update(game, theta, gradients, point.optimizer_state, settings)
        return Point(parameters, buffers, state, loss.detach())

    return step


def surrogate(value: Value, points: Sequence[Point], pair: Pair) -> Tensor:
    """Return f_K (Eq. 9), the value at theta_D^K; given several points, the mean (App. B.2)."""
    values = [value(point, pair) for point in points]
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def generator_value(discriminator: Functional, objective: Objective) -> Value:
    """Return f as a function of a point: what G minimises there."""

    def value(point: Point, pair: Pair) -> Tensor:
        fake, real = views(pair)
        f, _ = discriminator(
            lambda d: objective.generator_loss(d, fake, real), point.parameters, point.buffers
        )
        check_scalar(f, "generator_loss")
        return f

    return value


def training_loss(
    wrapper: nn.Module, module: nn.Module, objective: Objective, pair: Pair
) -> Tensor:
    """Return D's loss at theta_D itself, by a training forward in its wrapper, fakes detached."""
    fake, real = differentiable(map_tensors(Tensor.detach, pair[0])), pair[1]
    d = FunctionalDiscriminator(wrapper, module)
    loss = objective.discriminator_loss(d, fake, real)
    check_scalar(loss, "discriminator_loss")
    return loss


def without_graph(ahead: LookAhead) -> LookAhead:
    """Return the look-ahead with theta_D^1..K as constants: no second term in Eq. 12."""

    def constant(
        point: Point, pairs: Sequence[Pair], settings: Any, *, every: bool = False
    ) -> tuple[list[Point], list[Tensor]]:
        detached = {id(pair): map_tensors(Tensor.detach, pair) for pair in pairs}
        with torch.no_grad():
            points, losses = ahead(point, [detached[id(p)] for p in pairs], settings, every=every)
            return map_tensors(Tensor.detach, points), losses

    return constant


def one_step(ahead: LookAhead) -> Step:
    """Return a look-ahead of one step."""

    def step(point: Point, pair: Pair, settings: Any) -> Point:
        ((following,), _) = ahead(point, [pair], settings)
        return following

    return step


def leaves(parameters: Mapping[str, Tensor], moving: frozenset[str]) -> dict[str, Tensor]:
    """Return theta_D^k with a gradient in those that move; theta_D^0 and constants have none."""
    return {
        name: p.detach().requires_grad_() if name in moving and not p.requires_grad else p
        for name, p in parameters.items()
    }


def differentiate(
    game: Game,
    theta: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    pair: Pair,
    create_graph: bool,
) -> tuple[Tensor, Gradients, dict[str, Tensor]]:
    """Return D's loss, its gradients in the moving parameters that it reaches, and D's buffers."""
    versions = [t._version for t in tensors(pair)]
    with torch.enable_grad(), without_autocast_cache():
        fake, real = differentiable(views(pair[0])), views(pair[1])
        loss, left = game.discriminator(
            lambda d: game.objective.discriminator_loss(d, fake, real), theta, buffers
        )
        check_unchanged(pair, versions)
        check_scalar(loss, "discriminator_loss")
        if not loss.requires_grad:
            return loss, {}, left
        moving = [name for name in theta if name in game.moving]
        found = inner_gradients(loss, [theta[n] for n in moving], create_graph=create_graph)
        own = game.discriminator.parameters
        gradients = {
            name: after_hooks(own[name], gradient, name)
            for name, gradient in zip(moving, found, strict=True)
            if gradient is not None
        }
        return loss, gradients, left


def differentiable(batch: Batch) -> Batch:
    """Return a batch that an objective may differentiate in, whether G's gradient is asked for."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_() if t.is_floating_point() else t

    return map_tensors(lambda t: t if t.requires_grad else leaf(t), batch)


def update(
    game: Game, theta: Mapping[str, Tensor], gradients: Gradients, state: Any, settings: Any
) -> tuple[Mapping[str, Tensor], Any]:
    """Return theta_D^{k+1} and the optimizer's next state."""
    device = next(iter(theta.values())).device
    with torch.autocast(device.type, enabled=False):  # optimizers keep full precision
        if game.transform_gradients is not None:
            gradients = mapped("transform_gradients", game.transform_gradients, gradients)
        parameters, state = game.optimizer.step(theta, gradients, state, settings)
        if game.project is not None:
            parameters = mapped("project", game.project, parameters)
    return parameters, state


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Disable autocast's weight cache: it ignores non-leaves and accumulates in half precision."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def after_hooks(parameter: Tensor, gradient: Tensor, name: str) -> Tensor:
    """Return a gradient after the hooks of the real parameter, which backward() would run."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"discriminator: the gradient of {name!r} is sparse, which the look-ahead cannot "
            "differentiate. Build the layer with sparse=False."
        )
    for hook in (parameter._backward_hooks or {}).values():
        try:
            replaced = hook(gradient)
        except AssertionError as error:
            if "inside a backward call" not in str(error):
                raise
            raise TypeError(
                "discriminator: its parameters have a hook of register_multi_grad_hook, which runs "
                "in backward() alone. Use parameter.register_hook, or remove it for G's step."
            ) from error
        if replaced is not None:
            lost = gradient.requires_grad and not replaced.requires_grad
            if lost and bool(replaced.any()):
                raise ValueError(outside_autograd("discriminator, a gradient hook", name))
            gradient = replaced
    return gradient
