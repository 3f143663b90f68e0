"""What a step of the user's loop does otherwise than one of the look-ahead, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn

from unroll._diagnostics.report import Report, unclear
from unroll._diagnostics.step_record import TOLERANCE, Call, Numbers, norm
from unroll._functional import Pair
from unroll._objectives import ON_LOGITS, Criterion, LeastSquares, Losses, Minimax, NonSaturating
from unroll._optimizers import listed
from unroll._penalties import R1, R2, GradientPenalty, summands

REMEDY = "Train D by loss.discriminator_loss(fake, real), or pass the objective of your loop."
CLIPS = (
    "the loop clips the gradients by {0}, to {1:.4g}: pass transform_gradients=unroll.{2}({1:.4g})."
)
_MODES = (
    "D's layers {0} are in another mode (training, evaluation) in `step` than before it, where the "
    "look-ahead takes its steps in theirs. Call D.train() before the loss, or D.eval() in `step`."
)
_ROUNDED = "D's gradients are round-off or not finite here (is D too sure? too coarse?)."
_UNLIKE = (
    "two look-ahead steps from one random state differ: D or the objective keeps state where it is "
    "not given back (an object of a class of your own, a closure), or draws from another generator "
    "than the global ones. Keep it in a buffer, an attribute or a dict."
)
_EARLY = (
    "`step` changes {0} before the optimizer's step (a clip?). Do it after the step, and give it "
    "to the look-ahead as project=."
)


def judged(calls: Iterable[Call]) -> Report:
    """Return verdict, relative error and suspicions; the first call that differs is explained."""
    counts: list[int] = []
    scales: list[tuple[float, float]] = []
    words: list[str] = []
    error, before, first = 0.0, None, None
    for number, call in enumerate(calls, 1):
        before = before or call.settings
        words = words or [*_changes(before, call.settings)][:1]
        counts += [] if call.skipped else call.counts
        if any(call.counts):
            scales.append((norm(call.real), norm(call.ours)))
            if first is None:
                error = max(error, call.error)
                first = (number, call) if call.wrong or not call.telling else None
    if not counts:
        return unclear(
            "`step` takes no step of the optimizer, as a GradScaler does where gradients are not "
            "finite. Ask after some steps of training, when it has found its scale"
        )
    if set(counts) != {1}:
        each = counts if len(set(counts)) > 1 else counts[:1]
        taken = f"{', '.join(map(str, each))} steps" if any(counts) else "no step"
        words.append(
            f"`step` takes {taken} of the optimizer that the loss was made with; a look-ahead "
            "step takes one. Let each call of `step` take one."
        )
    certain = bool(words)
    if first is not None:
        number, call = first
        found, sure = _explained(call, scales)
        words += [f"step {number}: " * (number > 1) + text for text in found]
        certain = certain or sure
    verdict = ("wrong" if certain else "inconclusive") if words else "right"
    return Report(verdict, error if scales else float("inf"), tuple(words))


def _changes(before: Sequence[Any], now: Sequence[Any]) -> Iterator[str]:
    for old, new in zip(before, now, strict=True):
        for key, value in new.items():
            numbers = all(isinstance(v, (int, float)) for v in (value, old[key]))
            if numbers and not isclose(value, old[key], rel_tol=TOLERANCE):
                yield (
                    f"{key!r} of the optimizer changes in `step`, from {old[key]:.4g} to "
                    f"{value:.4g}; the look-ahead keeps it. Step the scheduler outside."
                )


def _explained(call: Call, scales: Sequence[tuple[float, float]]) -> tuple[list[str], bool]:
    """Return what differs and what mends it, and whether that is certain."""
    if not call.telling:
        return [_UNLIKE if call.unlike else _ROUNDED], False
    if call.modes:
        return [_MODES.format(listed({type(layer).__name__ for layer in call.modes}))], True
    words: list[str] = []
    if call.strangers:
        words.append(
            f"the optimizer moves tensors that are not in D (shapes {listed(call.strangers)}). "
            "Register in D what its loss uses: layers in an nn.ModuleList."
        )
    outside = [n for n in call.moved if n not in call.ours]  # of no optimizer of the loss
    alone = outside + [n for n in call.off if not call.ours[n].any()]
    still = [n for n in call.off if not call.real[n].any()]
    if call.off and not norm(call.real):
        words.append("no gradient reaches the optimizer's step. Is it zeroed after backward?")
    elif call.off and call.early:
        words.append(_EARLY.format(listed(call.early)))
    elif call.off and (named := "".join(call.sigmoid) or _other_game(call, scales)):
        words.append(named)
    else:
        if alone:
            words.append(
                f"{listed(alone)} move in the loop alone (another optimizer, or frozen for the "
                "look-ahead only?). Make the loss with all of D's optimizers, and freeze alike."
            )
        if still:
            words.append(
                f"{listed(still)} move in the look-ahead alone: `step` freezes them, or its loss "
                "does not use them. Freeze them by requires_grad_(False) for both; where the loop "
                "freezes all of D for G's step, take D's loss from loss.discriminator_loss."
            )
        if others := set(call.off).difference(alone, still):
            drawn = " Random numbers are drawn, which may be all: draw noise outside, for `step`."
            words.append(
                "D's loss in `step` is another than the objective's: the gradients differ by "
                f"{call.error:.1%}, in {listed(others)} (a penalty, other labels, other samples "
                f"than it is given, D in another mode?). {REMEDY}{drawn * call.drew}"
            )
            return words, bool(words[1:]) or not call.drew
    if call.off:
        return words, True
    if call.zeros:
        words.append(
            f"{listed(call.zeros)} get no gradient, but keep zeros of an earlier one, for which "
            "the optimizer moves them in the loop alone (momentum, weight decay). Call "
            "optimizer.zero_grad(set_to_none=True)."
        )
    if call.state:
        words.append(
            f"the optimizer's state ({listed({k for k, _ in call.state})}) differs, though the "
            "gradients agree: `step` changes it, or its class takes another step."
        )
    elif call.early and not call.off:
        words.append(_EARLY.format(listed(call.early)))
    elif changed := [n for n in call.moved if n not in (*outside, *call.zeros)]:
        words.append(
            f"`step` does not do to {listed(changed)} what project= of the loss does (another "
            "bound, or nothing at all?). Do the same after the optimizer's step."
            if call.loss.project is not None
            else f"`step` changes {listed(changed)} after the optimizer's step (weight clipping, a "
            "normalisation, another optimizer?): give that to the look-ahead as project=."
        )
    return words, True


def _other_game(call: Call, scales: Sequence[tuple[float, float]]) -> str:
    """Return what turns our gradients into the loop's, "" where nothing known does."""

    def vector(gradients: Numbers) -> Tensor:
        found = {n: torch.zeros_like(g) for n, g in call.ours.items()} | gradients
        return torch.cat([found[n].flatten() for n in call.ours])

    def of(objective: Any, pair: Pair | None = None) -> Tensor:
        try:
            return vector(call.gradients(objective, pair, raw=True))
        except (RuntimeError, TypeError, ValueError):  # a game that cannot be played here
            return torch.zeros_like(real)  # which explains nothing

    def fit(*basis: Tensor, positive: bool = False) -> list[float]:
        """Return the factors with which the basis adds up to the loop's, none where it does not."""
        if real.numel() <= 2 * len(basis) or not all(b.any() for b in basis):
            return []
        matrix = torch.stack(basis, 1)
        scale = matrix.norm(dim=0)
        factors = torch.linalg.lstsq(matrix / scale, real[:, None]).solution[:, 0]
        found = factors / scale
        fits = (matrix @ found - real).norm() <= allowed
        return found.tolist() if fits and not (positive and (factors <= allowed).any()) else []

    def weighted(factor: float) -> str:
        alike = clips or isclose(factor, 1, rel_tol=1e-3)
        return "" if alike else f", D's loss times {factor:.4g} (weight=)"

    def in_one_batch(discriminator: Any, fake: Any, real: Any) -> Tensor:
        on_real, on_fake = discriminator(torch.cat([real, fake])).split([len(real), len(fake)])
        given: Any = lambda batch: on_real if batch is real else on_fake  # noqa: E731
        return objective.discriminator_loss(given, fake, real)

    real, objective = vector(call.real), call.loss.objective
    ours, given = of(objective), vector(call.ours)
    clips = not torch.allclose(ours, given, rtol=TOLERANCE)  # so that no scale can be told
    ours = ours if clips else given
    # In proportion to what is explained: round-off of a larger gradient explains everything.
    tolerance = TOLERANCE + call.noise / call.size
    allowed = tolerance * float(real.norm())
    cap = float(real.abs().max())
    parts = summands(objective)
    names = [type(part).__name__ for part in parts]
    if found := fit(ours):
        if clips and isclose(found[0], 1, rel_tol=tolerance):
            return (
                "`step` does not do what transform_gradients= of the loss does. Do it there before "
                "the optimizer's step, or leave it out of the loss."
            )
        if clips and found[0] > 0:
            return CLIPS.format("norm", norm(call.real), "ClipGradNorm")
        if isclose(found[0], 1, rel_tol=tolerance):  # too small to fit
            return ""
        return _scaled(found[0], scales, getattr(parts[0], "weight", 1.0))
    if float((ours.clamp(-cap, cap) - real).norm()) <= allowed:
        return CLIPS.format("value", cap, "ClipGradValue")
    if fit(of(objective, call.pair[::-1])):
        return "fake and real are swapped, in `step` or in the call."
    accumulated = fit(ours, vector(call.left))
    if accumulated and all(isclose(factor, 1, rel_tol=1e-2) for factor in accumulated):
        return "gradients accumulate: call the optimizer's zero_grad() in `step`, before backward."
    terms = [of(part) for part in parts]
    if len(parts) > 1 and (found := fit(*terms)):
        found = [c / found[0] for c in found] if clips and found[0] > 0 else found
        said = [
            f"{name} with factor {c:.4g}" if abs(c) > 1e-3 else f"no {name}"
            for c, name in zip(found, names, strict=True)
            if abs(c - 1) > 1e-3
        ]
        return f"D's loss in `step` has {', '.join(said)}, unlike the objective. {REMEDY}"
    for penalty in (R1, R2, GradientPenalty):
        if found := fit(ours, of(penalty(1.0)), positive=True):
            scale = found[0] if clips else 1.0
            name = f"unroll.{penalty.__name__}({found[1] / scale:.4g})"
            return f"D's loss in `step` has a penalty: add + {name}{weighted(found[0])}."
    for kind in ON_LOGITS:
        if found := fit(of(kind()), *terms[1:], positive=True):
            return (
                f"D's loss in `step` is unroll.{kind.__name__}(){weighted(found[0])}, not the "
                f"objective's {names[0]}. {REMEDY}"
            )
    # D's loss is affine in both labels, up to a constant.
    for game in filter(None, map(_with_labels, parts)):
        labels = {"real_label": game.real_label, "fake_label": game.fake_label}
        moved = of(replace(game, real_label=0.5)), of(replace(game, fake_label=0.5))
        found = fit(ours, *(other - of(game) for other in moved))
        if not found or found[0] <= 0:
            continue
        moves = {
            n: c / found[0] * (0.5 - labels[n]) for n, c in zip(labels, found[1:], strict=True)
        }
        if max(map(abs, moves.values())) < 0.4 * abs(game.real_label - game.fake_label):
            new = ", ".join(f"{n}={round(labels[n] + move, 4) + 0.0}" for n, move in moves.items())
            return (
                f"labels in `step` are smoothed: pass {new} to "
                f"unroll.Criterion{weighted(found[0])}."
            )
    if fit(of(Losses(in_one_batch, objective.generator_loss))):
        return f"`step` runs real and fake in one batch through D (BatchNorm). {REMEDY}"
    each = {n: float((call.real[n] * g).sum() / g.square().sum()) for n, g in call.ours.items()}
    apart = [(call.real[n] - factor * call.ours[n]).norm() for n, factor in each.items()]
    told = not clips and real.numel() > 2 * len(each) and all(0 < f <= 1 for f in each.values())
    if told and float(max(apart)) <= allowed:
        return (
            "the loop scales the gradients of D's parts by factors of their own, from "
            f"{min(each.values()):.4g} to {max(each.values()):.4g} (clipped apart?): pass a "
            "function that does the same as transform_gradients=."
        )
    return ""


def _scaled(ratio: float, scales: Sequence[tuple[float, float]], weight: float) -> str:
    """Return what multiplies the gradients: a weight, or a clip by their norm."""
    if ratio < 0:
        return f"D's loss in `step` has the opposite sign (fake and real swapped?). {REMEDY}"
    ratios = [real / ours for real, ours in scales if ours]
    norms = [real for real, ours in scales if real < ours * (1 - TOLERANCE)]
    one = len(ratios) == 1  # which cannot tell
    clips = ratio < 1 and bool(norms) and _alike(norms) and (one or not _alike(ratios))
    weighs = (
        f"D's loss in `step` is {ratio:.4g} times the objective's: divide it by that, or pass "
        f"weight={weight * ratio:.4g} to unroll.Criterion."
    )
    clipped = CLIPS.format("norm", norms[0], "ClipGradNorm") if clips else ""
    return " Or ".join([weighs] * (one or not clips) + [clipped] * clips)


def _with_labels(part: object) -> Criterion | None:
    """Return a game with the same loss of D that has labels, if there is one."""
    if isinstance(part, (Minimax, NonSaturating)):
        return Criterion(nn.BCEWithLogitsLoss())
    if isinstance(part, LeastSquares):
        return Criterion(nn.MSELoss(), weight=0.5)
    return part if isinstance(part, Criterion) else None


def _alike(numbers: Sequence[float]) -> bool:
    return not numbers or max(numbers) - min(numbers) <= TOLERANCE * max(numbers)
