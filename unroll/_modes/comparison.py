"""Whether compiled code does what the eager step does, derivatives included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unroll._functional import Pair, map_tensors, tensors
from unroll._look_ahead import Point, Step
from unroll._modes.adjoint import filled, leaves
from unroll._random import RandomState, random_state, replayed

Given = tuple[Point, Pair, Any]  # point, pair and settings


def compare(
    compiled: Step, step: Step, given: Given, state: RandomState, device: torch.device
) -> None:
    """Raise RuntimeError if compiled code differs from a step by more than round-off does.

    Round-off is what the step differs by from itself when its inputs move by a few units in the
    last place. ``state`` is that of the random generators before both.
    """
    nudged: Given = map_tensors(perturbed, given)
    values, ends, drawn = [], [], []
    for function, start in ((compiled, given), (step, given), (step, nudged)):
        inputs = leaves(tensors(start), [t.requires_grad for t in tensors(start)])
        with replayed(state, device):
            point, pair, settings = filled(start, inputs)
            following = function(point, pair, settings)
            drawn.append(tensors(random_state(device)))
        parameters, optimizer_state = following.parameters, tensors(following.optimizer_state)
        moved = [p - point.parameters[name] for name, p in parameters.items()]
        found = [*moved, *optimizer_state, *following.buffers.values()]
        values.append([t.detach() for t in found])
        wanted = [t for t in inputs if t.requires_grad]
        ends.append((wanted, parameters.values(), optimizer_state))
    if not all(map(torch.equal, *drawn[:2])):
        raise RuntimeError("it draws other random numbers")
    meant = [_compared(*each) for each in zip(*values, strict=True)]
    try:
        _compare_derivatives(ends, [True] * len(meant))
    except RuntimeError:
        # What is round-off alone has derivatives that are: those of a bias before BatchNorm, whose
        # gradient is zero and which Adam moves all the same, outweigh all others.
        _compare_derivatives(ends, meant)


def _compared(ours: Tensor, eager: Tensor, nudged: Tensor) -> bool:
    """Compare what compiled code, the step and the nudged step have; say if it is no round-off."""
    error, norm, noise = _norm(ours - eager), _norm(eager), _norm(nudged - eager)
    if not error <= 1e-3 * norm + 10 * noise:
        raise RuntimeError(
            f"the compiled step's result is off by {error:.1e} in {norm:.1e} (a derivative of D's "
            "own, or dropout of a transposed tensor?)"
        )
    return noise <= 0.1 * norm


def _compare_derivatives(ends: Sequence[Any], meant: Sequence[bool]) -> None:
    """Compare derivatives of two sums of what the steps lead to, of what is meant."""
    found = []
    for inputs, *groups in ends:
        slopes, which = list[Tensor](), iter(meant)
        for outputs in groups:
            # Of theta_D^{k+1} alone, round-off may be all there is (Adam's first step): so twice.
            seeded = [t for t in outputs if next(which) and t.requires_grad]
            seeds = [
                torch.arange(t.numel(), dtype=t.dtype, device=t.device).cos().view(t.shape)
                for t in seeded
            ]
            how: Any = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
            slopes += torch.autograd.grad(seeded, inputs, seeds, **how) if seeded else ()
        found.append(slopes)
    for each in zip(*found, strict=True):
        _compared(*each)


def perturbed(tensor: Tensor) -> Tensor:
    """Return a tensor that is off by a few units in the last place."""
    if not tensor.is_floating_point():
        return tensor
    pattern = torch.linspace(-8, 8, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    off = 1 + torch.finfo(tensor.dtype).eps * pattern.view(tensor.shape)
    return (tensor.detach() * off).requires_grad_(tensor.requires_grad)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
