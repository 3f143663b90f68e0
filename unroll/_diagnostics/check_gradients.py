"""A self-check of f_K's gradient against central differences, on float64 copies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from unroll._diagnostics.central import STEPS, Line, compare, gradients_of
from unroll._diagnostics.copies import InDouble, double, in_double, standing_in
from unroll._diagnostics.report import GradientReport, Report, unclear
from unroll._functional import Batch, Pair, map_tensors, preserved, tensors
from unroll._inspection import DETACHED_FAKES
from unroll._look_ahead import Game, Point, after_hooks, leaves, surrogate, update
from unroll._loss import UnrolledGeneratorLoss
from unroll._probes import innermost, leaf, probe_layers
from unroll._random import every_random_state, set_every_random_state
from unroll._validation import drawn_minibatches, mapped

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of training, never used in it
DIRECTIONS = 4  # for each tensor of fakes; some may tell nothing
UPDATED = (
    ": does it depend on what it updates in forward, outside of the graph ({0})? For a spectral "
    "norm use torch.nn.utils.parametrizations.spectral_norm, which stands still in the look-ahead"
)
OWN_ESTIMATE = (
    ": does it detach, or change gradients in a hook? Your loop's own steps take the same "
    "derivative, so that a straight-through estimator or a gradient reversal, where meant, is one "
    "here, too"
)


def check_gradients(
    loss: UnrolledGeneratorLoss,
    fake: Batch,
    real: Batch,
    *,
    minibatches: Iterable[Pair] | None = None,
) -> GradientReport:
    """Compare f_K's gradient with central differences, for your own D, optimizer and objective.

    Everything is copied first, and read in float64, so nothing of yours changes. Random numbers are
    replayed from one state, so that dropout passes. With ``stop_gradient`` differences are taken at
    one theta_D^1..K. It costs 30 to 140 evaluations of the loss for each tensor of fakes (most
    where nothing can be told): call it once, on a small batch, before training. A cache outside of
    D that a first call fills (a global, an ``lru_cache``) is filled in float64: call D before.

    Args:
        loss: The unrolled loss.
        fake: Generated samples, as for ``loss``; they may be detached.
        real: Real samples.
        minibatches: As for ``loss``; exactly K pairs are drawn. Default: none.

    Returns:
        A report with the verdict, the error and what may be wrong.

    Raises:
        TypeError: D, the optimizer, the objective or ``project`` cannot be copied, or
            ``minibatches`` holds something else than pairs; their code runs in its own type only,
            not in float64; no fakes are floating-point.
        ValueError: ``minibatches`` holds fewer than K pairs.

    Example:
        >>> import torch, unroll
        >>> d = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.Adam(d.parameters())
        >>> loss = unroll.UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
        >>> unroll.check_gradients(loss, torch.randn(16, 2), torch.randn(16, 2)).ok
        True
    """
    if minibatches is not None:
        minibatches = drawn_minibatches(minibatches, loss.unroll_steps)
    batch, resampled = map_tensors(double, ((fake, real), minibatches))
    every = tensors([f for f, _ in (batch, *(resampled or ()))])
    dense = [t for t in every if t.layout == torch.strided]  # not a graph's matrix
    fakes = [t.requires_grad_() for t in dense if t.is_floating_point()]
    if not fakes:
        kinds = [str(t.dtype) for t in tensors(fake)]
        raise TypeError(
            f"fake: must hold a floating-point tensor, for check_gradients to move; got {kinds}. "
            "Give torch.view_as_real of complex samples, and let D's forward put them together."
        )
    device = fakes[0].device
    state = every_random_state(device)
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = loss.discriminator.parameters()
        mode = InDouble(next(p.dtype for p in own if p.is_floating_point()))
        check = Check(in_double(loss, mode), batch, resampled, mode)
        try:
            with mode, standing_in(check.loss.discriminator, loss.discriminator):
                report = check.run(fakes)
        except Exception as failure:
            given = map_tensors(leaf, (fake, real, minibatches))
            value = loss(given[0], given[1], minibatches=given[2])
            gradients_of(value, [t for t in tensors(given[0]) if t.requires_grad])
            raise TypeError(
                "loss: check_gradients computes in float64, in which the code of D or of the "
                f"objective fails, though not in its own type ({type(failure).__name__}: "
                f"{failure}). Let it keep the type of its input in place of one that it names."
            ) from failure
        finally:
            set_every_random_state(state, device)
    words = report.suspicions
    if any(str(w.message) == DETACHED_FAKES for w in caught):
        words += ("the objective (or D) detaches the fakes in discriminator_loss",)
    elif words or report.verdict != "wrong":
        return report
    looked = loss.unroll_steps and not loss.stop_gradient  # at D's layers, too
    operations = (
        f"the objective{'' if looked else ' or D'}: its own operations have a wrong derivative "
        "(does it detach, use .data or a straight-through estimator, or change D's mode between "
        "its two losses, so that one reads the statistics that the other has moved?)"
    )
    return Report("wrong", report.relative_error, words or (operations,))


@dataclass
class Check:
    """f_K in float64 as a function of its fakes, from one state of the random generators."""

    loss: UnrolledGeneratorLoss
    batch: Pair
    minibatches: Sequence[Pair] | None
    mode: InDouble
    constants: Sequence[Point] = ()  # theta_D^1..K under stop_gradient

    def __post_init__(self) -> None:
        self.device = next(self.loss.discriminator.parameters()).device
        self.random_state = every_random_state(self.device)

    @contextmanager
    def replayed(self, state: Any) -> Iterator[None]:
        """Read and draw everything from one state, and go on as if nothing had been drawn."""
        now = every_random_state(self.device)
        set_every_random_state(state, self.device)
        self.mode.twins.clear()
        with preserved(*self.loss._parts):
            self.mode.rounding.clear()  # of what an earlier forward pass has left in attributes
            yield
        set_every_random_state(now, self.device)

    def f(self) -> Tensor:
        """Return f_K, under ``stop_gradient`` at theta_D^1..K of the first call."""
        with self.replayed(self.random_state):
            pairs = self.loss._pairs(self.batch, self.minibatches, differentiable=False)
            points, value = self.loss._points(self.batch, pairs)
            if self.loss.stop_gradient:
                points = self.constants = self.constants or points
            return surrogate(value, points, self.batch)

    def run(self, fakes: Sequence[Tensor]) -> Report:
        """Return what the differences say, and what explains it."""
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
            reason = (
                "the gradient is not finite: an operation of the objective, the optimizer or D has "
                "no finite slope here (for a torchopt transformation, try eps_root=1e-8)"
            )
            return Report("wrong", float("inf"), (reason,))
        lines = [[Line(self.f, [fake]) for _ in range(DIRECTIONS)] for fake in fakes]
        size = max(float(line.products(line.gradients).norm()) for along in lines for line in along)
        found = [[compare(line, size) for line in along] for along in lines]
        told = [[f for f in along if f.verdict != "inconclusive"] or along for along in found]
        order = ("right", "inconclusive", "wrong")
        report = max(chain(*told), key=lambda f: (order.index(f.verdict), f.relative_error))
        if report.ok:
            if any(bool(g.any()) for g in gradients):
                return report
            return unclear(
                "f_K does not change with the fakes here, as where D's units are dead. Check with "
                "other parameters of D"
            )
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
        left: dict[str, Tensor] = {}  # buffers

        def d_loss() -> Tensor:
            with self.replayed(self.random_state):
                value, buffers = game.discriminator(
                    lambda d: loss.objective.discriminator_loss(d, fake, real), theta, point.buffers
                )
            left.update(buffers)
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
                own = [
                    n
                    for n, b in left.items()
                    if order == 1 and n.startswith(path) and not n.endswith(STATISTICS)
                    if not (n in point.buffers and torch.equal(b, point.buffers[n]))
                ]
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
        weights = {name: torch.randn_like(p) for name, p in theta.items()}

        def after_hook(name: str) -> Mapping[str, Tensor]:
            return {name: after_hooks(game.discriminator.parameters[name], gradients[name], name)}

        def updated(game: Game) -> Mapping[str, Tensor]:
            state = point.optimizer_state
            return update(game, theta, gradients, state, game.optimizer.settings)[0]

        def along_weights(stage: Callable[[], Mapping[str, Tensor]]) -> Tensor:
            return torch.stack([(p * weights[n]).sum() for n, p in stage().items()]).sum()

        stages: dict[str, Callable[[], Mapping[str, Tensor]]] = {
            f"the gradient hook of {name!r}": partial(after_hook, name)
            for name in gradients
            if game.discriminator.parameters[name]._backward_hooks
        }
        if (transform := loss.transform_gradients) is not None:
            name = "transform_gradients"
            stages["transform_gradients="] = lambda: mapped(name, transform, gradients)
        stages["the optimizer's update"] = partial(updated, replace(game, project=None))
        stages["project="] = partial(updated, game)
        for what, stage in stages.items():
            line = Line(partial(along_weights, stage), [*gradients.values()], motions)
            if compare(line).verdict == "wrong":
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
                found = gradients_of(value, points, create_graph=True)
                value = torch.stack([(g * w).sum() for g, w in zip(found, row, strict=True)]).sum()
            return value

        try:
            return compare(Line(along_weights, points))
        except RuntimeError as error:  # no such derivative, or nothing to differentiate
            return unclear(str(error))
