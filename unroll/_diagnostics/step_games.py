"""Which other game explains the gradients of the user's loop, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isclose
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unroll._diagnostics.step_record import TOLERANCE, Call, Numbers, taken
from unroll._functional import Pair
from unroll._objectives import Criterion, LeastSquares, Minimax, NonSaturating, one_tensor
from unroll._penalties import R1, R2, GradientPenalty, summands
from unroll._random import set_every_random_state

REMEDY = "Train D by loss.discriminator_loss(fake, real), or pass the objective of your loop."
CLIPPING = "Clip in the look-ahead, too: transform_gradients=unroll."


def other_game(call: Call, names: Sequence[str], scales: Sequence[tuple[float, float]]) -> str:
    """Return what turns our gradients into the loop's, "" where nothing known does."""

    def vector(gradients: Numbers) -> Tensor:
        empty = {n: torch.zeros_like(call.ours[n]) for n in names} | gradients
        return torch.cat([empty[n].flatten() for n in names])

    def of(objective: Any, pair: Pair = call.pair) -> list[Tensor]:
        set_every_random_state(call.random, next(call.loss.discriminator.parameters()).device)
        game, h = replace(call.game, objective=objective), call.game.optimizer.settings
        try:
            return [vector(taken(call.loss, game, call.point, pair, h).gradients)]
        except (RuntimeError, TypeError, ValueError):  # a game that cannot be played here
            return []

    real, ours = vector(call.real), vector(call.ours)
    allowed, cap = TOLERANCE * float(real.norm()) + call.noise, float(real.abs().max())

    def fit(*basis: Tensor) -> list[float]:
        return _fit(real, basis, allowed)

    parts = summands(call.loss.objective)
    if found := fit(ours):
        return _scaled(found[0], scales, getattr(parts[0], "weight", 1.0))
    if float((ours.clamp(-cap, cap) - real).norm()) <= allowed:
        value = f"{cap:.4g}"
        return (
            f"the loop clips the gradients by value, to {value}. {CLIPPING}ClipGradValue({value})."
        )
    if fit(*of(call.loss.objective, call.pair[::-1])):
        return "fake and real are swapped, in `step` or in the call."
    if fit(ours, vector(call.left)):
        return "gradients accumulate: zero D's .grad in `step`, before its backward."
    if len(parts) > 1 and (found := fit(*(term for part in parts for term in of(part)))):
        pairs = zip(found, parts, strict=True)
        said = [f"{c:.2f} times {type(p).__name__}" for c, p in pairs if abs(c - 1) > 1e-3]
        return f"D's loss in `step` has {', '.join(said)} of the objective. {REMEDY}"
    for penalty in (R1(1.0), R2(1.0), GradientPenalty(1.0)):
        if found := fit(ours, *of(penalty)):
            name = f"unroll.{type(penalty).__name__}({found[1]:.4g})"
            return f"D's loss in `step` has a penalty: add + {name}{_weighted(found[0])}."
    for part in parts:
        terms = [of(_relabelled(part, i)) for i in (0, 1)]
        if all(terms) and (found := fit(ours, *terms[0], *terms[1])):
            on_real, on_fake = (
                round(_label(part, i) - found[1 + i] / found[0], 4) + 0.0 for i in (0, 1)
            )
            return (
                f"labels in `step` are smoothed: pass real_label={on_real}, fake_label="
                f"{on_fake} to unroll.Criterion{_weighted(found[0])}."
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


def _label(part: Any, which: int) -> float:
    return float(getattr(part, ("real_label", "fake_label")[which], 1 - which))


def _relabelled(part: Any, which: int) -> Any:
    """Return what D's loss gains per unit by which the label of real or fake samples falls."""

    def discriminator_loss(discriminator: Any, fake: Any, real: Any) -> Tensor:
        output, label = one_tensor(discriminator, (real, fake)[which]), _label(part, which)
        if isinstance(part, Criterion):
            step = 0.5 if label > 0.5 else -0.5  # to a label between 0 and 1
            fallen = part._against(output, label - step) - part._against(output, label)
            return part.weight * fallen / step
        if isinstance(part, (Minimax, NonSaturating, LeastSquares)):
            return output.mean()
        raise TypeError("no labels")

    return SimpleNamespace(discriminator_loss=discriminator_loss)


def _fit(target: Tensor, basis: Sequence[Tensor], allowed: float) -> list[float]:
    """Return the factors with which the basis adds up to the target, none where it does not."""
    if not basis or target.numel() <= 2 * len(basis) or not all(b.any() for b in basis):
        return []
    matrix = torch.stack(list(basis), 1)
    scale = matrix.norm(dim=0)
    factors = torch.linalg.lstsq(matrix / scale, target[:, None]).solution[:, 0] / scale
    return factors.tolist() if float((matrix @ factors - target).norm()) <= allowed else []


def _alike(numbers: Sequence[float]) -> bool:
    return not numbers or max(numbers) - min(numbers) <= TOLERANCE * max(numbers)
