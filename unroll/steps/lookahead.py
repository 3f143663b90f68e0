"""The K look-ahead steps of the discriminator, Eq. 6 to 8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unroll.game import parts
from unroll.game.objectives import Objective
from unroll.inspection import (
    inspect_step,
    refuse_layers,
    refuse_own_parameters,
    refuse_update_by_own_parameters,
)
from unroll.optimizers import InnerOptimizer
from unroll.stateless import (
    Batch,
    Stateless,
    aliased,
    hooked,
    map_tensors,
    mutation_message,
    tensors,
)
from unroll.steps.checks import Project, check_scalar, projected, same
from unroll.steps.compiled import CompiledStep, Game
from unroll.steps.discriminator import At, Point, start
from unroll.steps.ranks import averaged
from unroll.steps.recompute import recomputed, refuse_unrepeatable


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Cast every theta_D^k at each use: the cache holds leaves only, and adds up in half."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@dataclass
class LookAhead:
    """K steps of D from where it stands, on private copies of all that they change."""

    module: Stateless
    optimizer: InnerOptimizer
    objective: Objective
    moving: frozenset[str]  # names of the parameters that take steps
    constant: bool  # whether theta_D^1..K are constants: no second term in Eq. 12
    checkpoint: bool  # whether steps are computed again in the backward pass
    project: Project | None
    sync: bool  # whether gradients are averaged over the ranks of ``group``
    group: Any
    compiled: CompiledStep | None  # what runs in place of eager steps
    inspected: bool  # whether a first step has been searched for broken derivatives
    losses: list[Tensor] = field(default_factory=list)  # D's before each step, detached

    def trajectory(self, batches: Iterable[tuple[Batch, Batch]], *, average: bool) -> list[Point]:
        """Step from theta_D^0 = theta_D (Eq. 6) on each (fake, real).

        Returns theta_D^K, or theta_D^1..K with ``average``.
        """
        point = start(self.module, self.optimizer.initial_state())
        points: list[Point] = []
        with _without_autocast_cache():
            for fake, real in batches:
                point = self._advance(point, fake, real)
                assert point.loss is not None
                self.losses.append(point.loss)
                points = [*points, point] if average else [point]
        return points or [point]

    def _advance(self, point: Point, fake: Batch, real: Batch) -> Point:
        if self.constant:
            fake, real = map_tensors(Tensor.detach, (fake, real))
            return self._once(point, fake, real, graph=False)
        if not self.checkpoint:
            return self._once(point, fake, real, graph=True)
        inspected, given = self.inspected, (point, fake, real)
        where = self.module.module, parts(self.objective)
        following = recomputed(self._once, *where, given)
        if self.inspected and not inspected:
            refuse_unrepeatable(self._step, *where, given)
        return following

    def _once(self, point: Point, fake: Batch, real: Batch, *, graph: bool) -> Point:
        given = (point, fake, real)
        if self.compiled is None:
            following = self._step(*given, graph=graph)
        else:
            uninspected = point.loss is None and not (self.inspected or self.constant)
            if self.sync:
                self.compiled.fall_back("its gradients are averaged over ranks (sync)")
            module = self.module.module
            game = Game(module, self.optimizer, self.objective, self.project, self.moving)
            following = self.compiled(self._step, game, given, graph=graph, eager=uninspected)
        return following if graph else self._without_graph(following, point)

    def _step(self, point: Point, fake: Batch, real: Batch, *, graph: bool) -> Point:
        """Return theta_D^{k+1} = theta_D^k + eta df/dtheta_D^k (Eq. 7)."""
        theta = {n: p if p.requires_grad else self._leaf(n, p) for n, p in point.parameters.items()}
        inspect = (
            not (self.inspected or self.constant)
            and point.loss is None
            and any(t.requires_grad for t in tensors((fake, real)))
        )
        if point.loss is None and not self.constant:
            refuse_layers(self.module.module)
        d = At(self.module, theta, point.buffers, twice=True)
        with torch.enable_grad():
            fake, real = aliased(fake), aliased(real)
            loss = self.objective.discriminator_loss(d, fake, real)
            check_scalar(loss, "discriminator_loss")
            local = self._gradients(loss, theta)
            gradients = self._over_ranks(local, theta, tensors((fake, real)))
            if self.compiled is not None:
                self.compiled.reached = tuple(gradients)
        with (
            torch.set_grad_enabled(graph or inspect),
            torch.autocast(loss.device.type, enabled=False),  # optimizers keep full precision
        ):
            moved, state = self.optimizer.step(theta, gradients, point.optimizer_state)
            if self.project is not None:
                moved = projected(self.project, moved, inspect=inspect)
        if inspect:
            module = self.module.module
            for name, own in self.module.parameters.items():  # .data leaves no other trace
                if not same(theta[name], own):
                    raise RuntimeError(mutation_message(name))
            refuse_own_parameters(module, loss, tensors((fake, real)))
            refuse_update_by_own_parameters(
                module, [*moved.values(), *tensors(state)], [loss, *tensors((fake, real))]
            )
            inspect_step(module, theta.values(), local, tensors(fake), lambda: d(real))
            self.inspected = True
        return Point(moved, d.buffers, state, loss.detach())

    def _leaf(self, name: str, value: Tensor) -> Tensor:
        return value.detach().requires_grad_(name in self.moving)

    def _without_graph(self, point: Point, last: Point) -> Point:
        """Return a point that requires gradients at least where its graph would have."""
        kept = {id(t) for t in tensors(last.optimizer_state)}  # settings, and what was skipped

        def leaf(t: Tensor, moves: bool) -> Tensor:
            return t.detach().requires_grad_(moves and not self.constant and t.is_floating_point())

        def state(t: Tensor) -> Tensor:
            return leaf(t, t.requires_grad or id(t) not in kept)

        return Point(
            {name: leaf(p, name in self.moving) for name, p in point.parameters.items()},
            {name: leaf(b, b.requires_grad) for name, b in point.buffers.items()},
            map_tensors(state, point.optimizer_state),
            point.loss,
        )

    def _gradients(self, loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return df/dtheta_D^k of the moving parameters that the loss depends on."""
        found: dict[str, Tensor] = {}
        moving = {name: p for name, p in parameters.items() if name in self.moving}
        if loss.requires_grad:
            gradients = torch.autograd.grad(
                loss, list(moving.values()), create_graph=not self.constant, allow_unused=True
            )
            pairs = zip(moving, gradients, strict=True)
            found = {
                name: hooked(self.module.parameters[name], g) for name, g in pairs if g is not None
            }
        for name, gradient in found.items():
            if gradient.layout != torch.strided:
                raise TypeError(
                    f"discriminator: the gradient of {name!r} is sparse, which the look-ahead "
                    "cannot differentiate. Build the layer with sparse=False."
                )
        return found

    def _over_ranks(
        self, found: dict[str, Tensor], parameters: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Return the gradients that the step takes: this rank's, or with ``sync`` the mean."""
        if self.sync:
            moving = {name: p for name, p in parameters.items() if name in self.moving}
            # All ranks run the same backward pass, those whose gradients are constant too.
            reached = [t for t in (*batch, *moving.values()) if t.requires_grad]
            found = averaged(found, moving, self.group, () if self.constant else reached)
        if not found:
            raise ValueError(
                "objective: discriminator_loss must depend on the parameters of the discriminator "
                "it is given; its loss depends on none that the optimizer trains. Call the "
                "`discriminator` argument, not the module itself, and do not detach its output."
            )
        return found
