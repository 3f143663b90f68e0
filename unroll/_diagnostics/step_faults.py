"""What a step of the user's loop does otherwise than one of the look-ahead, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isclose
from typing import Any

from unroll._diagnostics.step_games import REMEDY, other_game
from unroll._diagnostics.step_record import TOLERANCE, Call, double, norm
from unroll._optimizers import listed


def judged(calls: Iterable[Call]) -> tuple[str, float, tuple[str, ...]]:
    """Return verdict, relative error and suspicions; the first call that differs is explained."""
    counts: list[int] = []
    scales: list[tuple[float, float]] = []
    words: list[str] = []
    error = 0.0
    first, before, certain = None, None, True
    for call in calls:
        before = before or call.game.optimizer.settings
        words = words or list(_changes(before, call.settings))[:1]
        counts.append(len(call.settings))
        if call.settings:
            scales.append((norm(call.real), norm(call.ours)))
            error = error if first else max(error, call.error)
            if first is None and (call.wrong or not call.telling):
                first, number = call, len(counts)
    if not any(counts):
        error = float("inf")
        words.append(
            "`step` takes no step of the optimizer that the loss was made with. Call its step() in "
            "it, or make the loss with the optimizer that trains D."
        )
    elif max(counts) > 1:
        words.append(
            f"`step` takes {max(counts)} steps of the optimizer in a call; a look-ahead step is "
            "one. Let `step` take one, and count them in unroll_steps."
        )
    elif min(counts) < 1:
        words.append(
            f"only {sum(counts)} of {len(counts)} calls of `step` took a step of the optimizer "
            "(gradients accumulated over calls?). Let `step` take a whole one."
        )
    if first is not None:
        found, certain = _explained(first, scales)
        words += [f"step {number}: " * (number > 1) + text for text in found]
        certain = certain or len(words) > len(found)
    return ("wrong" if certain else "inconclusive") if words else "right", error, tuple(words)


def _explained(call: Call, scales: Sequence[tuple[float, float]]) -> tuple[list[str], bool]:
    """Return what differs and what mends it, and whether that is certain."""
    if not call.telling:
        reason = "D's gradients are round-off or not finite here (is D too sure? too coarse?)."
        return [reason], False
    words, certain = [], True
    floors = (call.floor, call.floor) if call.off else (0.0, 0.0)
    real, ours = (call.real, call.ours) if call.off else call.moves[:2]
    wrong = call.off or ([] if call.state else call.moved)
    alone = [n for n in wrong if float(ours[n].norm()) <= floors[0]]
    still = [n for n in wrong if float(real[n].norm()) <= floors[1]]
    rest = [n for n in wrong if n not in (*alone, *still)]
    early = [n for n in call.early if n in call.game.moving]
    if call.off and not norm(real):
        words.append("no gradient reaches the optimizer's step. Is it zeroed after backward?")
    elif call.off and early:
        words.append(
            f"`step` changes {listed(early)} before the optimizer's step (a clip?). Do it "
            "after the step, and give it to the look-ahead as project=."
        )
    elif call.off or call.moved:
        words += _alone(alone, still)
    if call.state and not call.off:
        words.append(
            f"the optimizer's state ({listed({k for k, _ in call.state})}) differs, though the "
            "gradients agree: `step` changes it, or its class takes another step."
        )
    elif rest and not words and not call.off:
        words.append(_projection(call, rest))
    elif rest and not words:
        words.append(other_game(call, [n for n in ours if n not in (*alone, *still)], scales))
        certain = bool(words[0]) or not call.drew
        words[0] = words[0] or (
            "D's loss in `step` is another than the objective's: the gradients differ by "
            f"{call.error:.1%} (a penalty, other labels, other samples than it is given, real "
            f"and fake in one batch of BatchNorm, D in another mode?). {REMEDY}"
            + " But random numbers are drawn, which may be all: draw them outside, and give "
            "noise and fakes to `step`." * call.drew
        )
    if call.strangers:
        words.append(
            f"the optimizer moves tensors that are not in D (shapes {listed(call.strangers)}). "
            "Register in D what its loss uses: layers in an nn.ModuleList."
        )
    return words, certain


def _projection(call: Call, names: list[str]) -> str:
    """Return what happens besides the optimizer's step."""
    start = double(call.point.parameters)
    after, ours = ({n: start[n] + u.moves[n] for n in names} for u in call.updates[:2])
    cap = max(float(p.abs().max()) for p in after.values())
    gap = norm({n: (p.clamp(-cap, cap) - after[n]) for n, p in ours.items()})
    clips = sum(int((p.abs() == cap).sum()) for p in after.values()) > 1
    return (
        f"`step` clips {listed(names)} to {cap:.4g} after the optimizer's step"
        if clips and gap <= 1e-3 * norm(ours)
        else f"`step`, or another optimizer, changes {listed(names)} after the optimizer's step"
    ) + ": give that to the look-ahead as project=, a function of a mapping of tensors."


def _changes(before: Any, settings: list[Any]) -> Iterator[str]:
    for now in settings:
        for old, new in zip(before, now, strict=False):
            for key, value in new.items():
                numbers = all(isinstance(v, (int, float)) for v in (value, old.get(key)))
                if numbers and not isclose(value, old[key], rel_tol=TOLERANCE):
                    yield (
                        f"{key!r} of the optimizer changes in `step`, from {old[key]:.4g} to "
                        f"{value:.4g}; the look-ahead keeps it. Step the scheduler outside."
                    )


def _alone(alone: list[str], still: list[str]) -> list[str]:
    words = []
    if alone:
        words.append(
            f"{listed(alone)} move in the loop alone (another optimizer, or frozen for the "
            "look-ahead only?). Let one optimizer hold all of D, and freeze alike in both."
        )
    if still:
        words.append(
            f"{listed(still)} move in the look-ahead alone: `step` freezes them, or its loss does "
            "not use them. Freeze them by requires_grad_(False) before the look-ahead, too."
        )
    return words
