"""What a step of the user's loop does otherwise than one of the look-ahead, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn

from unroll._diagnostics.report import Report
from unroll._diagnostics.step_record import TOLERANCE, Begun, Call, Numbers, norm
from unroll._functional import Pair
from unroll._objectives import (
    ON_LOGITS,
    Criterion,
    LeastSquares,
    Losses,
    Minimax,
    NonSaturating,
    Objective,
)
from unroll._optimizers import listed
from unroll._penalties import R1, R2, GradientPenalty, summands

REMEDY = "Train D by loss.discriminator_loss(fake, real), or pass the objective of your loop."
CLIPPING = "Clip in the look-ahead, too: transform_gradients=unroll."


def judged(calls: Iterable[Call]) -> Report:
    """Return verdict, relative error and suspicions; the first call that differs is explained."""
    done: list[Call] = []
    words: list[str] = []
    error = 0.0
    first, certain = None, True
    for call in calls:
        done.append(call)
        words = words or list(_changes(done[0].settings, call.begun))[:1]
        if call.begun:
            error = error if first else max(error, call.error)
            if first is None and (call.wrong or not call.telling):
                first, number = call, len(done)
    most, whole = max(max(c.counts) for c in done), sum(all(c.counts) for c in done)
    if not most:
        error = float("inf")
        words.append(
            "`step` takes no step of the optimizer that the loss was made with. Call its step() in "
            "it, or make the loss with the optimizer that trains D."
        )
    elif most > 1:
        words.append(
            f"`step` takes {most} steps of the optimizer in a call; a look-ahead step is one. Let "
            "`step` take one, and count them in unroll_steps."
        )
    elif whole < len(done):
        words.append(
            f"only {whole} of {len(done)} calls of `step` took a step of each optimizer "
            "(gradients accumulated over calls?). Let `step` take a whole one."
        )
    if first is not None:
        scales = [(norm(c.real), norm(c.ours)) for c in done if c.begun]
        found, certain = _explained(first, scales)
        words += [f"step {number}: " * (number > 1) + text for text in found]
        certain = certain or len(words) > len(found)
    verdict = ("wrong" if certain else "inconclusive") if words else "right"
    return Report(verdict, error, tuple(words))


def _changes(settings: Sequence[Any], begun: Iterable[Begun]) -> Iterator[str]:
    for one in begun:
        for old, new in zip(settings[one.which], one.groups, strict=False):
            for key, value in new.items():
                numbers = all(isinstance(v, (int, float)) for v in (value, old.get(key)))
                if numbers and not isclose(value, old[key], rel_tol=TOLERANCE):
                    yield (
                        f"{key!r} of the optimizer changes in `step`, from {old[key]:.4g} to "
                        f"{value:.4g}; the look-ahead keeps it. Step the scheduler outside."
                    )


def _explained(call: Call, scales: Sequence[tuple[float, float]]) -> tuple[list[str], bool]:
    """Return what differs and what mends it, and whether that is certain."""
    if not call.telling:
        reason = "D's gradients are round-off or not finite here (is D too sure? too coarse?)."
        return [reason], False
    words, certain = [], True
    outside = [n for n in call.moved if n not in call.ours]  # of no optimizer of the loss
    alone = outside + [n for n in call.off if float(call.ours[n].norm()) <= call.floor]
    still = [n for n in call.off if float(call.real[n].norm()) <= call.floor]
    if call.strangers:
        words.append(
            f"the optimizer moves tensors that are not in D (shapes {listed(call.strangers)}). "
            "Register in D what its loss uses: layers in an nn.ModuleList."
        )
    if call.off and not norm(call.real):
        words.append("no gradient reaches the optimizer's step. Is it zeroed after backward?")
    elif call.off and call.early:
        words.append(
            f"`step` changes {listed(call.early)} before the optimizer's step (a clip?). Do it "
            "after the step, and give it to the look-ahead as project=."
        )
    elif call.off and (named := _other_game(call, scales)):
        words.append(named)
    elif alone or still:
        if alone:
            words.append(
                f"{listed(alone)} move in the loop alone (another optimizer, or frozen for the "
                "look-ahead only?). Make the loss with all of D's optimizers, and freeze alike."
            )
        if still:
            words.append(
                f"{listed(still)} move in the look-ahead alone: `step` freezes them, or its loss "
                "does not use them. Freeze them by requires_grad_(False) for both."
            )
    elif call.off:
        certain = not call.drew
        words.append(
            "D's loss in `step` is another than the objective's: the gradients differ by "
            f"{call.error:.1%} (a penalty, other labels, other samples than it is given, D in "
            f"another mode?). {REMEDY}"
            + " But random numbers are drawn, which may be all: draw them outside, and give "
            "noise and fakes to `step`." * call.drew
        )
    if call.off:
        return words, certain
    if call.state:
        words.append(
            f"the optimizer's state ({listed({k for k, _ in call.state})}) differs, though the "
            "gradients agree: `step` changes it, or its class takes another step."
        )
    elif changed := [n for n in call.moved if n not in outside]:
        words.append(_projection(call, changed))
    return words, certain


def _projection(call: Call, names: list[str]) -> str:
    """Return what happens besides the optimizer's step."""
    ours, after = ({n: call.start[n] + moves[n] for n in names} for moves in call.moves)
    cap = max(float(p.abs().max()) for p in after.values())
    gap = norm({n: p.clamp(-cap, cap) - after[n] for n, p in ours.items()})
    if gap <= 1e-3 * norm(ours) and sum(int((p.abs() == cap).sum()) for p in after.values()) > 1:
        change = f"`step` clips {listed(names)} to {cap:.4g}"
    else:
        change = f"`step`, or another optimizer, changes {listed(names)}"
    return (
        f"{change} after the optimizer's step: give that to the look-ahead as project=, a "
        "function of a mapping of tensors."
    )


def _other_game(call: Call, scales: Sequence[tuple[float, float]]) -> str:
    """Return what turns our gradients into the loop's, "" where nothing known does."""

    def vector(gradients: Numbers) -> Tensor:
        found = {n: torch.zeros_like(g) for n, g in call.ours.items()} | gradients
        return torch.cat([found[n].flatten() for n in call.ours])

    def of(objective: Any, pair: Pair | None = None) -> Tensor:
        try:
            return vector(call.gradients(objective, pair))
        except (RuntimeError, TypeError, ValueError):  # a game that cannot be played here
            return torch.zeros_like(real)  # which explains nothing

    def fit(*basis: Tensor) -> list[float]:
        return _fit(real, basis, allowed)

    real, ours = vector(call.real), vector(call.ours)
    allowed, cap = TOLERANCE * float(real.norm()) + call.noise, float(real.abs().max())
    objective = call.loss.objective
    parts = summands(objective)
    if found := fit(ours):
        return _scaled(found[0], scales, getattr(parts[0], "weight", 1.0))
    if float((ours.clamp(-cap, cap) - real).norm()) <= allowed:
        value = f"{cap:.4g}"
        return (
            f"the loop clips the gradients by value, to {value}. {CLIPPING}ClipGradValue({value})."
        )
    if fit(of(objective, call.pair[::-1])):
        return "fake and real are swapped, in `step` or in the call."
    if fit(ours, vector(call.left)):
        return "gradients accumulate: call the optimizer's zero_grad() in `step`, before backward."
    terms = [of(part) for part in parts]
    if len(parts) > 1 and (found := fit(*terms)):
        names = [(c, type(part).__name__) for c, part in zip(found, parts, strict=True)]
        said = [
            f"no {name}" if abs(c) < 1e-3 else f"{name} with factor {c:.4g}"
            for c, name in names
            if abs(c - 1) > 1e-3
        ]
        return f"D's loss in `step` has {', '.join(said)}, beside the objective's. {REMEDY}"
    for penalty in (R1(1.0), R2(1.0), GradientPenalty(1.0)):
        if found := fit(ours, of(penalty)):
            name = f"unroll.{type(penalty).__name__}({found[1]:.4g})"
            return f"D's loss in `step` has a penalty: add + {name}{_weighted(found[0])}."
    for part in parts:
        # D's loss is affine in both labels, up to a constant.
        if criterion := _as_criterion(part):
            labels = criterion.real_label, criterion.fake_label
            moved = of(replace(criterion, real_label=0.5)), of(replace(criterion, fake_label=0.5))
            if found := fit(ours, *(other - of(criterion) for other in moved)):
                on_real, on_fake = (
                    round(label + c / found[0] * (0.5 - label), 4) + 0.0
                    for c, label in zip(found[1:], labels, strict=True)
                )
                return (
                    f"labels in `step` are smoothed: pass real_label={on_real}, fake_label="
                    f"{on_fake} to unroll.Criterion{_weighted(found[0])}."
                )
    for game in (kind() for kind in ON_LOGITS):
        if found := fit(of(game), *terms[1:]):
            return (
                f"D's loss in `step` is unroll.{type(game).__name__}(){_weighted(found[0])}, not "
                f"the objective's {type(parts[0]).__name__}. {REMEDY}"
            )
    if fit(of(Losses(_in_one_batch(objective), objective.generator_loss))):
        return (
            "`step` runs real and fake in one batch through D (BatchNorm), the objective each in "
            f"its own. {REMEDY}"
        )
    return ""


def _scaled(ratio: float, scales: Sequence[tuple[float, float]], weight: float) -> str:
    """Return what multiplies the gradients: a weight, or a clip by their norm."""
    if ratio < 0:
        return f"D's loss in `step` has the opposite sign (fake and real swapped?). {REMEDY}"
    ratios = [real / ours for real, ours in scales if ours]
    norms = [real for real, ours in scales if real < ours * (1 - TOLERANCE)]
    clips = ratio < 1 and max(ratios) < 1 + TOLERANCE and _alike(norms)
    words = []
    if _alike(ratios) or not clips:
        words.append(
            f"D's loss in `step` is {ratio:.4g} times the objective's: divide it by that, or pass "
            f"weight={weight * ratio:.4g} to unroll.Criterion."
        )
    if clips and (len(ratios) == 1 or not _alike(ratios)):
        words.append(
            f"the loop clips the gradients by norm, to {norms[0]:.4g}. "
            f"{CLIPPING}ClipGradNorm({norms[0]:.4g})."
        )
    return " Or ".join(words)


def _weighted(ratio: float) -> str:
    return "" if isclose(ratio, 1, rel_tol=1e-3) else f", D's loss times {ratio:.4g} (weight=)"


def _as_criterion(part: object) -> Criterion | None:
    """Return a game with the same loss of D that has labels, if there is one."""
    if isinstance(part, (Minimax, NonSaturating)):
        return Criterion(nn.BCEWithLogitsLoss())
    if isinstance(part, LeastSquares):
        return Criterion(nn.MSELoss(), weight=0.5)
    return part if isinstance(part, Criterion) else None


def _in_one_batch(objective: Objective) -> Callable[[Any, Any, Any], Tensor]:
    """Return D's loss where D sees real and fake samples together."""

    def discriminator_loss(discriminator: Any, fake: Any, real: Any) -> Tensor:
        on_real, on_fake = discriminator(torch.cat([real, fake])).split([len(real), len(fake)])
        given: Any = lambda batch: on_real if batch is real else on_fake  # noqa: E731
        return objective.discriminator_loss(given, fake, real)

    return discriminator_loss


def _fit(target: Tensor, basis: Sequence[Tensor], allowed: float) -> list[float]:
    """Return the factors with which the basis adds up to the target, none where it does not."""
    if target.numel() <= 2 * len(basis) or not all(b.any() for b in basis):
        return []
    matrix = torch.stack(list(basis), 1)
    scale = matrix.norm(dim=0)
    factors = torch.linalg.lstsq(matrix / scale, target[:, None]).solution[:, 0] / scale
    return factors.tolist() if float((matrix @ factors - target).norm()) <= allowed else []


def _alike(numbers: Sequence[float]) -> bool:
    return not numbers or max(numbers) - min(numbers) <= TOLERANCE * max(numbers)
