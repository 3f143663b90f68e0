"""Whether compiled code does what the eager step does, derivatives included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unroll._functional import Pair, map_tensors, tensors
from unroll._look_ahead import Point, Step
from unroll._modes.checkpointed import filled, leaves
from unroll._random import RandomState, random_state, replayed

Given = tuple[Point, Pair, Any]  # point, pair and settings


def compare(
    compiled: Step, step: Step, given: Given, state: RandomState, device: torch.device
) -> None:
    """Raise RuntimeError if compiled code differs from a step by more than round-off does.

    Round-off is what the step differs by from itself when its inputs move by a few units in the
    last place. ``state`` is that of the random generators before both.
    """
    runs: tuple[tuple[Step, Given], ...] = (
        (compiled, given),
        (step, given),
        (step, map_tensors(perturbed, given)),
    )

    def taken(meant: Sequence[bool] | None = None) -> tuple[Sequence[Sequence[Tensor]], ...]:
        found = []
        for function, inputs in runs:
            with replayed(state, device):
                of_run = _values_and_derivatives(function, inputs, meant)
                found.append((*of_run, tensors(random_state(device))))
        return tuple(zip(*found, strict=True))

    values, derivatives, drawn = taken()
    if not all(map(torch.equal, *drawn[:2])):
        raise RuntimeError("it draws other random numbers")
    meant = _compared(values)
    try:
        _compared(derivatives)
    except RuntimeError:
        # What is round-off alone has derivatives that are: those of a bias before BatchNorm, whose
        # gradient is zero and which Adam moves all the same, outweigh all others.
        _compared(taken(meant)[1])


def _compared(found: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Compare what compiled code, the step and the nudged step have; say what is no round-off."""
    meant = []
    for ours, eager, nudged in zip(*found, strict=True):
        error, norm, noise = _norm(ours - eager), _norm(eager), _norm(nudged - eager)
        if not error <= 1e-3 * norm + 10 * noise:
            raise RuntimeError(
                f"the compiled step's result is off by {error:.1e} in {norm:.1e} (a derivative of "
                "D's own, or dropout of a transposed tensor?)"
            )
        meant.append(noise <= 0.1 * norm)
    return meant


def _values_and_derivatives(
    step: Step, given: Given, meant: Sequence[bool] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a step leads to, and derivatives of two sums of it, maybe of parts, in inputs."""
    inputs = leaves(tensors(given), [t.requires_grad for t in tensors(given)])
    point, pair, settings = filled(given, inputs)
    following = step(point, pair, settings)
    parameters, state = [*following.parameters.values()], tensors(following.optimizer_state)
    moved = [p - point.parameters[name] for name, p in following.parameters.items()]
    values = [t.detach() for t in (*moved, *state, *following.buffers.values())]
    wanted = [t for t in inputs if t.requires_grad]
    derivatives, which = list[Tensor](), iter(meant or [True] * len(values))
    for outputs in (parameters, state):
        # Of theta_D^{k+1} alone, round-off may be all there is (Adam's first step): so twice.
        seeded = [t for t in outputs if next(which) and t.requires_grad]
        if seeded:
            seeds = [
                torch.arange(t.numel(), dtype=t.dtype, device=t.device).cos().view(t.shape)
                for t in seeded
            ]
            how: Any = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
            derivatives += torch.autograd.grad(seeded, wanted, seeds, **how)
    return values, derivatives


def perturbed(tensor: Tensor) -> Tensor:
    """Return a tensor that is off by a few units in the last place."""
    if not tensor.is_floating_point():
        return tensor
    pattern = torch.linspace(-8, 8, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    off = 1 + torch.finfo(tensor.dtype).eps * pattern.view(tensor.shape)
    return (tensor.detach() * off).requires_grad_(tensor.requires_grad)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
