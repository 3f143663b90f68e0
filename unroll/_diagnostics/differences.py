"""f_K beside its central differences, and which part of a step explains a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unroll._diagnostics.central import STEPS, Line, compare, gradients_of, worst
from unroll._diagnostics.copies import InDouble
from unroll._diagnostics.report import Report, unclear
from unroll._functional import Pair, preserved, tensors
from unroll._look_ahead import Point, Value, after_hooks, leaves, surrogate
from unroll._loss import UnrolledGeneratorLoss
from unroll._probes import innermost, probe_layers
from unroll._random import every_random_state, set_every_random_state

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of training, never used in it
DIRECTIONS = 4  # for each tensor of fakes; some may tell nothing
INFINITE = (
    "the gradient is not finite: an operation of the objective, the optimizer or D has no finite "
    "slope here (for a torchopt transformation, try eps_root=1e-8)"
)
ANOTHER_GENERATOR = (
    "two calls from one random state differ: something draws from another generator than the "
    "global ones of torch, NumPy and Python, or keeps state between calls"
)
UPDATED = (
    ": does it depend on what it updates in forward, outside of the graph ({0})? For a spectral "
    "norm use torch.nn.utils.parametrizations.spectral_norm, which stands still in the look-ahead"
)
OWN_ESTIMATE = (
    ": does it detach, or change gradients in a hook? Your loop's own steps take the same "
    "derivative, so that a straight-through estimator or a gradient reversal, where meant, is one "
    "here, too"
)
DEAD = (
    "f_K does not change with the fakes here, as where D's units are dead. Check with other "
    "parameters of D"
)


class Check:
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
        with preserved(*self.loss._parts):
            yield
        set_every_random_state(now, self.device)

    def f(self) -> Tensor:
        """Return f_K."""
        with self.replayed(self.random_state):
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
            with self.replayed(self.random_state):
                self.constants = self.points()
        self.f()  # the first call looks the step through, which may draw more random numbers
        value = self.f()
        if not bool(value.isfinite()):
            return unclear(f"f_K itself is {value.item()}: lower D's learning rate")
        if not torch.equal(value, self.f()):
            return unclear(ANOTHER_GENERATOR)
        gradients = gradients_of(value, fakes)
        if not all(bool(g.isfinite().all()) for g in gradients):
            return Report("wrong", float("inf"), (INFINITE,))
        lines = [[Line(self.f, [fake]) for _ in range(DIRECTIONS)] for fake in fakes]
        size = max(float(line.products(line.gradients).norm()) for along in lines for line in along)
        found = [[compare(line, size) for line in along] for along in lines]
        told = [[f for f in along if f.verdict != "inconclusive"] or along for along in found]
        report = worst(f for along in told for f in along)
        if report.ok:
            return report if any(bool(g.any()) for g in gradients) else unclear(DEAD)
        if self.mode.rounding:
            names = ", ".join(sorted(self.mode.rounding))
            return unclear(
                f"the check computes in float64, but {names} of D or the objective return a "
                "coarser type. Check with code that keeps the precision of its input"
            )
        if report.verdict == "wrong" and self.loss.unroll_steps and not self.loss.stop_gradient:
            return Report("wrong", report.relative_error, tuple(self.explanations()))
        return report

    def explanations(self) -> Iterator[str]:
        """Differentiate the parts of one look-ahead step on their own."""
        loss, (fake, real) = self.loss, (self.minibatches or [self.batch])[0]
        with preserved(*loss._parts):
            game, point = loss._start(None)
        theta = leaves(point.parameters, game.moving)
        updated_buffers: list[str] = []

        def d_loss() -> Tensor:
            with self.replayed(self.random_state):
                value, buffers = game.discriminator(
                    lambda d: loss.objective.discriminator_loss(d, fake, real), theta, point.buffers
                )
            updated_buffers[:] = [
                n
                for n, b in buffers.items()
                if not n.endswith(STATISTICS)
                and not (n in point.buffers and torch.equal(b, point.buffers[n]))
            ]
            return value

        def found() -> dict[str, Tensor]:
            moving = {name: p for name, p in theta.items() if p.requires_grad}
            gradients = torch.autograd.grad(d_loss(), [*moving.values()], allow_unused=True)
            return {n: g for n, g in zip(moving, gradients, strict=True) if g is not None}

        for order, ordinal in enumerate(("first", "second", "third"), 1):
            probe = partial(self._derivative, order)
            layers = probe_layers(loss.discriminator, d_loss, probe)
            blamed = innermost([n for n, finding in layers.items() if finding.verdict == "wrong"])
            for name in blamed:
                path = "" if name.startswith("itself ") else name.split(" ")[0] + "."
                own = [n for n in updated_buffers if n.startswith(path) and order == 1]
                yield (
                    f"wrong {ordinal} derivative of layer {name} (relative error "
                    f"{layers[name].relative_error:.1e})"
                    + UPDATED.format(own) * bool(own)
                    + OWN_ESTIMATE * (order == 1 and not own)
                )
            if blamed:
                break

        # Gradients are moved as the fakes move them: one that is zero for every batch stays so.
        gradients = {name: g.requires_grad_() for name, g in found().items()}
        fakes = [t for t in tensors(fake) if t.is_floating_point()]
        with Line(d_loss, fakes).at(STEPS[0]):
            motions = [(g - gradients[n]).detach() / STEPS[0] for n, g in found().items()]
        hooked, optimizer = game.discriminator.parameters, game.optimizer
        weights = {name: torch.randn_like(p) for name, p in theta.items()}

        def wrong(stage: Callable[[], Mapping[str, Tensor]]) -> bool:
            def function() -> Tensor:
                return torch.stack([(p * weights[n]).sum() for n, p in stage().items()]).sum()

            return compare(Line(function, [*gradients.values()], motions)).verdict == "wrong"

        def after_hook(name: str) -> Mapping[str, Tensor]:
            return {name: after_hooks(hooked[name], gradients[name], name)}

        def transformed() -> Mapping[str, Tensor]:
            change = loss.transform_gradients
            return gradients if change is None else change(dict(gradients))

        def updated() -> dict[str, Tensor]:
            state = optimizer.initial_state
            return optimizer.step(theta, transformed(), state, optimizer.settings)[0]

        def projected() -> Mapping[str, Tensor]:
            return updated() if loss.project is None else loss.project(updated())

        stages: dict[str, Callable[[], Mapping[str, Tensor]]] = {
            f"the gradient hook of {name!r}": partial(after_hook, name)
            for name in gradients
            if hooked[name]._backward_hooks
        } | {
            "transform_gradients=": transformed,
            "the optimizer's update": updated,
            "project=": projected,
        }
        for what, stage in stages.items():
            if wrong(stage):
                yield f"wrong derivative of {what} (does it clip, detached?)"
                break

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
