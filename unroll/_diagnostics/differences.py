"""f_K and its parts against central differences, on float64 copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unroll._diagnostics.central import (
    ORDER,
    STEPS,
    Finding,
    Line,
    Origin,
    compare,
    gradients_of,
    unclear,
)
from unroll._diagnostics.copies import InDouble
from unroll._functional import Pair, preserved, tensors
from unroll._look_ahead import Point, Value, after_hooks, leaves, surrogate
from unroll._loss import UnrolledGeneratorLoss
from unroll._probes import innermost, probe_layers
from unroll._random import every_random_state, set_every_random_state

DIRECTIONS = 3  # for each tensor of fakes


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

    def f(self) -> Tensor:
        """Return f_K."""
        self.replay()
        with preserved(*self.loss._parts):
            points, value, after = self.constants or self.points()
            set_every_random_state(after, self.device)
            return surrogate(value, points, self.batch)

    def points(self) -> tuple[Sequence[Point], Value, Any]:
        """Return where f is evaluated, f, and the random state after the look-ahead."""
        pairs = self.loss._pairs(self.batch, self.minibatches, differentiable=False)
        points, value = self.loss._points(self.batch, pairs)
        return points, value, every_random_state(self.device)

    def replay(self) -> None:
        """Start again from one state of everything that the loss reads or draws from."""
        set_every_random_state(self.random_state, self.device)
        self.mode.twins.clear()

    def run(self, fakes: Sequence[Tensor]) -> Finding:
        """Return what the differences say, and what explains it."""
        if self.loss.stop_gradient:
            with preserved(*self.loss._parts):
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
            return Finding("wrong", float("inf"), [words])
        origins = [Origin(self.f, [fake]) for fake in fakes]
        size = max(Line(o).products(o.gradients).norm().item() for o in origins)
        found = [self._along(origin, size) for origin in origins]
        worst = max(found, key=lambda f: (ORDER.index(f.verdict), f.error))
        if worst.verdict == "right" and not any(bool(g.any()) for g in gradients):
            return unclear(
                "f_K does not change with the fakes here, as where D's units are dead. Check with "
                "other parameters of D"
            )
        if worst.verdict != "right" and self.mode.rounding:
            names = ", ".join(sorted(self.mode.rounding))
            return unclear(
                f"the check computes in float64, but {names} of D or the objective return a "
                "coarser type. Check with code that keeps the precision of its input"
            )
        explain = not self.loss.stop_gradient and self.loss.unroll_steps > 0
        if worst.verdict == "wrong" and explain:
            return worst._replace(words=self.explanations())
        return worst

    def _along(self, origin: Origin, size: float) -> Finding:
        """Return the worst finding along random directions, more of them if some say nothing."""
        found: list[Finding] = []
        for _ in range(2 * DIRECTIONS):
            found.append(compare(Line(origin), size))
            told = [f for f in found if f.verdict != "inconclusive"]
            if len(told) == DIRECTIONS:
                break
        return max(told or found, key=lambda f: (ORDER.index(f.verdict), f.error))

    def explanations(self) -> list[str]:
        """Differentiate the parts of one look-ahead step on their own."""
        loss, (fake, real) = self.loss, (self.minibatches or [self.batch])[0]
        with preserved(*loss._parts):
            game, point = loss._start(None)
            theta = leaves(point.parameters, game.moving)
            names = [name for name, p in theta.items() if p.requires_grad]

            def d_loss() -> Tensor:
                self.replay()
                value, _ = game.discriminator(
                    lambda d: loss.objective.discriminator_loss(d, fake, real), theta, point.buffers
                )
                return value

            def found() -> dict[str, Tensor]:
                moving = [theta[name] for name in names]
                pairs = zip(
                    names, torch.autograd.grad(d_loss(), moving, allow_unused=True), strict=True
                )
                return {name: g for name, g in pairs if g is not None}

            layers = probe_layers(loss.discriminator, d_loss, self._second_derivative)
            # Gradients are moved as the fakes move them: one that is zero for every batch stays so.
            gradients = {name: g.requires_grad_() for name, g in found().items()}
            fakes = [t for t in tensors(fake) if t.is_floating_point()]
            with Line(Origin(d_loss, fakes)).at(STEPS[0]):
                motions = {n: (g - gradients[n]).detach() / STEPS[0] for n, g in found().items()}
        own, optimizer = game.discriminator.parameters, game.optimizer
        weights = {name: torch.randn_like(p) for name, p in theta.items()}

        def hooked(name: str, gradient: Tensor) -> Tensor:
            return (after_hooks(own[name], gradient, name) * weights[name]).sum()

        def transformed() -> dict[str, Tensor]:
            change = loss.transform_gradients
            return gradients if change is None else dict(change(dict(gradients)))

        def clipped() -> Tensor:
            return torch.stack([(g * weights[n]).sum() for n, g in transformed().items()]).sum()

        def updated(project: bool) -> Tensor:
            state = optimizer.initial_state
            new, _ = optimizer.step(theta, transformed(), state, optimizer.settings)
            new = dict(loss.project(new)) if project and loss.project is not None else new
            return torch.stack([(p * weights[n]).sum() for n, p in new.items()]).sum()

        def wrong(function: Callable[[], Tensor], names: Iterable[str]) -> bool:
            origin = Origin(function, [gradients[n] for n in names])
            return compare(Line(origin, [motions[n] for n in names])).verdict == "wrong"

        suspicions = [
            f"wrong second derivative of layer {name} (relative error {layers[name].error:.1e})"
            for name in innermost(
                [n for n, finding in layers.items() if finding.verdict == "wrong"]
            )
        ]
        for name, gradient in gradients.items():
            if own[name]._backward_hooks and wrong(partial(hooked, name, gradient), [name]):
                suspicions.append(
                    f"wrong derivative of the gradient hook of {name!r} (does it clip, detached?)"
                )
        if wrong(clipped, gradients):
            suspicions.append("wrong derivative of transform_gradients= (does it detach?)")
        elif wrong(partial(updated, False), gradients):
            suspicions.append(
                "wrong derivative of the optimizer's update (does it clip, detached?)"
            )
        elif wrong(partial(updated, True), gradients):
            suspicions.append("wrong derivative of project= (does it detach?)")
        return suspicions

    def _second_derivative(
        self, layer: Callable[[], Any], inputs: list[Tensor], parameters: list[Tensor]
    ) -> Finding:
        points = inputs + parameters
        state = every_random_state(self.device)
        weights: list[Tensor] = []

        def gradient_along_weights() -> Tensor:
            set_every_random_state(state, self.device)
            outputs = [t for t in tensors(layer()) if t.requires_grad]
            value = torch.stack([(t + t.square()).sum() for t in outputs]).sum()
            found = torch.autograd.grad(value, points, create_graph=True, materialize_grads=True)
            if not weights:
                weights.extend(map(torch.randn_like, found))
            return torch.stack([(g * w).sum() for g, w in zip(found, weights, strict=True)]).sum()

        finding = compare(Line(Origin(gradient_along_weights, points)))
        set_every_random_state(state, self.device)
        return finding
