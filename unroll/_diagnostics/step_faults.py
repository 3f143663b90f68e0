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

Scales = Sequence[tuple[float, float]]  # norms of the loop's and of the look-ahead's gradients
REMEDY = "Train D by loss.discriminator_loss(fake, real), or pass the objective of your loop."
CLIPS = (
    "the loop clips the gradients by {0}, to {1:.4g}: pass transform_gradients=unroll.{2}({1:.4g})."
)
DRAWN = " Random numbers are drawn, which may be all: draw noise outside, for `step`."
ROUNDED = "D's gradients are round-off or not finite here (is D too sure? too coarse?)."
SWAPPED = "fake and real are swapped, in `step` or in the call."
OPPOSITE = f"D's loss in `step` has the opposite sign (fake and real swapped?). {REMEDY}"
UNLIKE = (
    "two look-ahead steps from one random state differ: D or the objective keeps state where it is "
    "not given back (an object of a class of your own, a closure), or draws from another generator "
    "than the global ones. Keep it in a buffer, an attribute or a dict."
)
FAULTS = {  # of the layers, parameters or parts of a state that have it
    "modes": "D's layers {} are in another mode (training, evaluation) in `step` than before it, "
    "where the look-ahead takes its steps in theirs. Call D.train() before the loss, or D.eval() "
    "in `step`.",
    "strangers": "the optimizer moves tensors that are not in D (shapes {}). Register in D what "
    "its loss uses: layers in an nn.ModuleList.",
    "early": "`step` changes {} before the optimizer's step (a clip?). Do it after the step, and "
    "give it to the look-ahead as project=.",
    "alone": "{} move in the loop alone (another optimizer, or frozen for the look-ahead only?). "
    "Make the loss with all of D's optimizers, and freeze alike.",
    "still": "{} move in the look-ahead alone: `step` freezes them, or its loss does not use them. "
    "Freeze them by requires_grad_(False) for both; where the loop freezes all of D for G's step, "
    "take D's loss from loss.discriminator_loss.",
    "zeros": "{} get no gradient, but keep zeros of an earlier one, for which the optimizer moves "
    "them in the loop alone (momentum, weight decay). Call optimizer.zero_grad(set_to_none=True).",
    "state": "the optimizer's state ({}) differs, though the gradients agree: `step` changes it, "
    "or its class takes another step.",
    "unprojected": "`step` does not do to {} what project= of the loss does (another bound, or "
    "nothing at all?). Do the same after the optimizer's step.",
    "projected": "`step` changes {} after the optimizer's step (weight clipping, a normalisation, "
    "another optimizer?): give that to the look-ahead as project=.",
}


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


def _explained(call: Call, scales: Scales) -> tuple[list[str], bool]:
    """Return what differs and what mends it, and whether that is certain."""

    def named(**faults: Iterable[str]) -> list[str]:
        found = {fault: list(names) for fault, names in faults.items()}
        return [FAULTS[fault].format(listed(names)) for fault, names in found.items() if names]

    if not call.telling:
        return [UNLIKE if call.unlike else ROUNDED], False
    if call.modes:
        return named(modes={type(layer).__name__ for layer in call.modes}), True
    words = named(strangers=call.strangers)
    if not call.off:
        changed = [n for n in call.moved if n not in (*call.outside, *call.zeros)]
        words += named(alone=call.outside, zeros=call.zeros)
        if call.state:
            return words + named(state={str(path[-1]) for path in call.state}), True
        if call.early:
            return words + named(early=call.early), True
        what = "projected" if call.loss.project is None else "unprojected"
        return words + named(**{what: changed}), True
    if not norm(call.real):
        return [
            *words,
            "no gradient reaches the optimizer's step. Is it zeroed after backward?",
        ], True
    if call.early:
        return words + named(early=call.early), True
    if game := "".join(call.sigmoid) or next(_explanations(call, scales), ""):
        flips = call.drew and game in (SWAPPED, OPPOSITE)  # of labels, at random perhaps
        return [*words, game + DRAWN * flips], not flips
    alone = [n for n in call.off if n in call.untaken]
    still = [n for n in call.off if not call.real[n].any()]
    words += named(alone=[*call.outside, *alone], still=still)
    certain = bool(words) or not call.drew
    if others := set(call.off).difference(alone, still):
        words.append(
            "D's loss in `step` is another than the objective's: the gradients differ by "
            f"{call.error:.1%}, in {listed(others)} (a penalty, other labels, other samples than "
            f"it is given, D in another mode?). {REMEDY}{DRAWN * call.drew}"
        )
    return words, certain


def _explanations(call: Call, scales: Scales) -> Iterator[str]:
    """Yield what turns gradients that the look-ahead can take into the loop's, likelier first."""

    def vector(gradients: Numbers) -> Tensor:
        found = {n: torch.zeros_like(g) for n, g in call.ours.items()} | gradients
        return torch.cat([found[n].flatten() for n in call.ours])

    def of(objective: Any, pair: Pair | None = None) -> Tensor:
        try:
            return vector(call.gradients(objective, pair)[0])
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

    real, given, objective = vector(call.real), vector(call.ours), call.loss.objective
    raw = vector(call.raw)
    clips = not torch.allclose(raw, given, rtol=TOLERANCE)  # so that no scale can be told
    ours = raw if clips else given
    # In proportion to what is explained: round-off of a larger gradient explains everything.
    tolerance = TOLERANCE + call.noise / call.size
    allowed = tolerance * float(real.norm())
    parts = summands(objective)
    kinds = [type(part).__name__ for part in parts]

    if found := fit(ours):
        if isclose(found[0], 1, rel_tol=tolerance):
            if clips:
                yield (
                    "`step` does not do what transform_gradients= of the loss does. Do it there "
                    "before the optimizer's step, or leave it out of the loss."
                )
        elif clips and found[0] > 0:
            yield CLIPS.format("norm", norm(call.real), "ClipGradNorm")
        else:
            yield _scaled(found[0], scales, getattr(parts[0], "weight", 1.0))
        return  # what is not named is too small to fit
    cap = float(real.abs().max())
    if float((ours.clamp(-cap, cap) - real).norm()) <= allowed:
        yield CLIPS.format("value", cap, "ClipGradValue")
    if fit(of(objective, call.pair[::-1])):
        yield SWAPPED
    found = fit(ours, vector(call.left))
    if found and all(isclose(factor, 1, rel_tol=1e-2) for factor in found):
        yield "gradients accumulate: call the optimizer's zero_grad() in `step`, before backward."
    terms = [of(part) for part in parts]
    if len(parts) > 1 and (found := fit(*terms)):
        found = [c / found[0] for c in found] if clips and found[0] > 0 else found
        said = [
            f"{kind} with factor {c:.4g}" if abs(c) > 1e-3 else f"no {kind}"
            for c, kind in zip(found, kinds, strict=True)
            if abs(c - 1) > 1e-3
        ]
        yield f"D's loss in `step` has {', '.join(said)}, unlike the objective. {REMEDY}"
    for penalty in (R1, R2, GradientPenalty):
        if found := fit(ours, of(penalty(1.0)), positive=True):
            factor = found[1] / (found[0] if clips else 1.0)
            name = f"unroll.{penalty.__name__}({factor:.4g})"
            yield f"D's loss in `step` has a penalty: add + {name}{weighted(found[0])}."
    for kind in ON_LOGITS:
        if found := fit(of(kind()), *terms[1:], positive=True):
            name = f"unroll.{kind.__name__}(){weighted(found[0])}"
            yield f"D's loss in `step` is {name}, not the objective's {kinds[0]}. {REMEDY}"
    for game in filter(None, map(_with_labels, parts)):
        # D's loss is affine in both labels, up to a constant.
        slopes = (
            2 * (of(replace(game, real_label=0.75)) - of(replace(game, real_label=0.25))),
            2 * (of(replace(game, fake_label=0.75)) - of(replace(game, fake_label=0.25))),
        )
        if not (found := fit(ours, *slopes)) or found[0] <= 0:
            continue
        labels = {"real_label": game.real_label, "fake_label": game.fake_label}
        moves = {n: c / found[0] for n, c in zip(labels, found[1:], strict=True)}
        if max(map(abs, moves.values())) < 0.4 * abs(game.real_label - game.fake_label):
            new = ", ".join(f"{n}={round(labels[n] + move, 4) + 0.0}" for n, move in moves.items())
            yield (
                f"labels in `step` are smoothed: pass {new} to "
                f"unroll.Criterion{weighted(found[0])}."
            )
    if fit(of(Losses(in_one_batch, objective.generator_loss))):
        yield f"`step` runs real and fake in one batch through D (BatchNorm). {REMEDY}"
    each = {n: float((call.real[n] * g).sum() / g.square().sum()) for n, g in call.ours.items()}
    apart = vector({n: factor * call.ours[n] for n, factor in each.items()}) - real
    told = not clips and real.numel() > 2 * len(each) and all(0 < f <= 1 for f in each.values())
    if told and float(apart.norm()) <= allowed:
        yield (
            "the loop scales the gradients of D's parts by factors of their own, from "
            f"{min(each.values()):.4g} to {max(each.values()):.4g} (clipped apart?): pass a "
            "function that does the same as transform_gradients=."
        )


def _scaled(ratio: float, scales: Scales, weight: float) -> str:
    """Return what multiplies the gradients: a weight, or a clip by their norm."""
    if ratio < 0:
        return OPPOSITE
    weighs = (
        f"D's loss in `step` is {ratio:.4g} times the objective's: divide it by that, or pass "
        f"weight={weight * ratio:.4g} to unroll.Criterion."
    )
    capped = [real for real, ours in scales if real < ours * (1 - TOLERANCE)]
    steady = _alike([real / ours for real, ours in scales if ours])
    if ratio > 1 or not capped or not _alike(capped) or (steady and len(scales) > 1):
        return weighs
    clipped = CLIPS.format("norm", capped[0], "ClipGradNorm")
    return f"{weighs} Or {clipped}" if steady else clipped  # one step cannot tell


def _with_labels(part: object) -> Criterion | None:
    """Return a game with the same loss of D that has labels, if there is one."""
    if isinstance(part, (Minimax, NonSaturating)):
        return Criterion(nn.BCEWithLogitsLoss())
    if isinstance(part, LeastSquares):
        return Criterion(nn.MSELoss(), weight=0.5)
    return part if isinstance(part, Criterion) else None


def _alike(numbers: Sequence[float]) -> bool:
    return max(numbers) - min(numbers) <= TOLERANCE * max(numbers)
