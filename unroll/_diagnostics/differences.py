"""f_K and its parts against central differences, on float64 copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from unroll._diagnostics.central import STEPS, Line, compare, gradients_of
from unroll._diagnostics.copies import InDouble
from unroll._diagnostics.report import Report, unclear
from unroll._functional import Pair, preserved, tensors
from unroll._look_ahead import Point, Value, after_hooks, leaves, surrogate
from unroll._loss import UnrolledGeneratorLoss
from unroll._probes import innermost, probe_layers
from unroll._random import every_random_state, set_every_random_state

DIRECTIONS = 3  # for each tensor of fakes
ORDINALS = ("first", "second", "third")


class DifferenceCheck:
    """f_K in float64 as a function of its fakes, from one state of the random generators."""

    def __init__(
        self,
        loss: UnrolledGeneratorLoss,
        batch: Pair,
        minibatches: Sequence[Pair] | None,
        mode: InDouble,
    ) -> None:
        self.loss, self.batch, self.minibatches, self.mode = loss, batch, minibatches, mode
        self.device = next(loss.discriminator.parameters()).device
        self.random_state = every_random_state(self.device)
        self.constants: tuple[Sequence[Point], Value, Any] | None = None  # under stop_gradient

    @contextmanager
    def replayed(self, state: Any) -> Iterator[None]:
        """Read and draw everything from one state, and go on as if nothing had been drawn."""
        now = every_random_state(self.device)
        set_every_random_state(state, self.device)
        self.mode.twins.clear()
        yield
        set_every_random_state(now, self.device)

    def f(self) -> Tensor:
        """Return f_K."""
        with self.replayed(self.random_state), preserved(*self.loss._parts):
            points, value, after = self.constants or self.points()
            set_every_random_state(after, self.device)
            return surrogate(value, points, self.batch)

    def points(self) -> tuple[Sequence[Point], Value, Any]:
        """Return where f is evaluated, f, and the random state after the look-ahead."""
        pairs = self.loss._pairs(self.batch, self.minibatches, differentiable=False)
        points, value = self.loss._points(self.batch, pairs)
        return points, value, every_random_state(self.device)

    def run(self, fakes: Sequence[Tensor]) -> Report:
        """Return what the differences say, and what explains it."""
        if self.loss.stop_gradient:
            with self.replayed(self.random_state), preserved(*self.loss._parts):
                self.constants = self.points()
        self.f()  # the first call looks the step through, which may draw more random numbers
        value = self.f()
        if not bool(value.isfinite()):
            return unclear(f"f_K itself is {value.item()}: lower D's learning rate")
        if not torch.equal(value, self.f()):
            return unclear(
                "two calls from one random state differ: something draws from another generator "
                "than the global ones of torch, NumPy and Python, or keeps state between calls"
            )
        gradients = gradients_of(value, fakes)
        if not all(bool(g.isfinite().all()) for g in gradients):
            words = (
                "the gradient is not finite: an operation of the objective, the optimizer or D has "
                "no finite slope here (for a torchopt transformation, try eps_root=1e-8)"
            )
            return Report("wrong", float("inf"), (words,))
        size = max(float(line.products(line.gradients).norm()) for line in map(self._line, fakes))
        worst = _worst(self._along(fake, size) for fake in fakes)
        if worst.ok and not any(bool(g.any()) for g in gradients):
            return unclear(
                "f_K does not change with the fakes here, as where D's units are dead. Check with "
                "other parameters of D"
            )
        if not worst.ok and self.mode.rounding:
            names = ", ".join(sorted(self.mode.rounding))
            return unclear(
                f"the check computes in float64, but {names} of D or the objective return a "
                "coarser type. Check with code that keeps the precision of its input"
            )
        explain = not self.loss.stop_gradient and self.loss.unroll_steps > 0
        if worst.verdict == "wrong" and explain:
            return Report("wrong", worst.relative_error, tuple(self.explanations()))
        return worst

    def _line(self, fake: Tensor) -> Line:
        return Line(self.f, [fake])

    def _along(self, fake: Tensor, size: float) -> Report:
        """Return the worst finding along random directions, more of them if some say nothing."""
        found: list[Report] = []
        for _ in range(2 * DIRECTIONS):
            found.append(compare(self._line(fake), size))
            told = [f for f in found if f.verdict != "inconclusive"]
            if len(told) == DIRECTIONS:
                break
        return _worst(told or found)

    def explanations(self) -> Iterator[str]:
        """Differentiate the parts of one look-ahead step on their own."""
        loss, (fake, real) = self.loss, (self.minibatches or [self.batch])[0]
        with preserved(*loss._parts):
            game, point = loss._start(None)
        theta = leaves(point.parameters, game.moving)
        buffers: dict[str, Tensor] = {}

        def d_loss() -> Tensor:
            with self.replayed(self.random_state), preserved(*loss._parts):
                value, left = game.discriminator(
                    lambda d: loss.objective.discriminator_loss(d, fake, real), theta, point.buffers
                )
            buffers.update(left)
            return value

        def found() -> dict[str, Tensor]:
            moving = {name: p for name, p in theta.items() if p.requires_grad}
            gradients = torch.autograd.grad(d_loss(), [*moving.values()], allow_unused=True)
            return {n: g for n, g in zip(moving, gradients, strict=True) if g is not None}

        for order, ordinal in enumerate(ORDINALS, 1):
            probe = partial(self._derivative, order)
            layers = probe_layers(loss.discriminator, d_loss, probe)
            blamed = innermost([n for n, finding in layers.items() if finding.verdict == "wrong"])
            for name in blamed:
                changed = self._changed(name.split(" ")[0], point.buffers, buffers)
                yield (
                    f"wrong {ordinal} derivative of layer {name} "
                    f"(relative error {layers[name].relative_error:.1e})"
                ) + (
                    f": it updates its buffers {changed} in forward, outside of the graph, so that "
                    "f_K depends on the fakes through them, too. For a spectral norm use "
                    "torch.nn.utils.parametrizations.spectral_norm, which stands still meanwhile"
                ) * (order == 1 and bool(changed))
            if blamed:
                break

        # Gradients are moved as the fakes move them: one that is zero for every batch stays so.
        gradients = {name: g.requires_grad_() for name, g in found().items()}
        fakes = [t for t in tensors(fake) if t.is_floating_point()]
        with Line(d_loss, fakes).at(STEPS[0]):
            motions = {n: (g - gradients[n]).detach() / STEPS[0] for n, g in found().items()}
        own, optimizer = game.discriminator.parameters, game.optimizer
        weights = {name: torch.randn_like(p) for name, p in theta.items()}

        def wrong(stage: Callable[[], Mapping[str, Tensor]], names: Sequence[str]) -> bool:
            def function() -> Tensor:
                return torch.stack([(p * weights[n]).sum() for n, p in stage().items()]).sum()

            line = Line(function, [gradients[n] for n in names], [motions[n] for n in names])
            return compare(line).verdict == "wrong"

        def transformed() -> Mapping[str, Tensor]:
            change = loss.transform_gradients
            return gradients if change is None else change(dict(gradients))

        def updated() -> dict[str, Tensor]:
            state = optimizer.initial_state
            return optimizer.step(theta, transformed(), state, optimizer.settings)[0]

        def projected() -> Mapping[str, Tensor]:
            return updated() if loss.project is None else loss.project(updated())

        for name, gradient in gradients.items():
            hooked = partial(after_hooks, own[name], gradient, name)
            if own[name]._backward_hooks and wrong(lambda: {name: hooked()}, [name]):  # noqa: B023
                yield f"wrong derivative of the gradient hook of {name!r} (does it clip, detached?)"
        for what, stage in (
            ("transform_gradients= (does it detach?)", transformed),
            ("the optimizer's update (does it clip, detached?)", updated),
            ("project= (does it detach?)", projected),
        ):
            if wrong(stage, [*gradients]):
                yield f"wrong derivative of {what}"
                break

    def _changed(
        self, path: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> list[str]:
        """Return the buffers of a layer that a forward pass has changed, statistics left out."""
        modules = dict(self.loss.discriminator.named_modules())
        prefix = "" if path == "itself" else f"{path}."
        return [
            name
            for name, buffer in after.items()
            if name.startswith(prefix)
            and not isinstance(modules[name.rpartition(".")[0]], _NormBase)
            and not (name in before and torch.equal(buffer, before[name]))
        ]

    def _derivative(
        self, order: int, layer: Callable[[], Any], inputs: list[Tensor], parameters: list[Tensor]
    ) -> Report:
        """Compare a derivative of a layer, a function of its inputs and parameters."""
        points, state = inputs + parameters, every_random_state(self.device)
        weights = [[torch.randn_like(p) for p in points] for _ in range(order - 1)]

        def along_weights() -> Tensor:
            with self.replayed(state):
                outputs = [t for t in tensors(layer()) if t.requires_grad]
            value = torch.stack([(t + t.square() + t.sin()).sum() for t in outputs]).sum()
            for row in weights:
                found = torch.autograd.grad(
                    value, points, create_graph=True, allow_unused=True, materialize_grads=True
                )
                value = torch.stack([(g * w).sum() for g, w in zip(found, row, strict=True)]).sum()
            return value

        try:
            return compare(Line(along_weights, points))
        except RuntimeError as error:  # no such derivative, or nothing to differentiate
            return unclear(str(error))


def _worst(found: Any) -> Report:
    order = ("right", "inconclusive", "wrong")
    worst: Report = max(found, key=lambda f: (order.index(f.verdict), f.relative_error))
    return worst
