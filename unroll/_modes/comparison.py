"""Whether compiled code does what the eager step does, derivatives included."""

from __future__ import annotations

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
    found = []
    runs: tuple[tuple[Step, Given], ...] = (
        (compiled, given),
        (step, given),
        (step, map_tensors(perturbed, given)),
    )
    for function, inputs in runs:
        with replayed(state, device):
            values = _values_and_derivatives(function, inputs)
            found.append((values, tensors(random_state(device))))
    (ours, drawn), (eager, drawn_eagerly), (nudged, _) = found
    for a, b, c in zip(ours, eager, nudged, strict=True):
        error, norm = _norm(a - b), _norm(b)
        if not error <= 1e-3 * norm + 10 * _norm(c - b):
            raise RuntimeError(f"its result is off by {error:.1e} in {norm:.1e}")
    if not all(map(torch.equal, drawn, drawn_eagerly)):
        raise RuntimeError("it draws other random numbers")


def _values_and_derivatives(step: Step, given: Given) -> list[Tensor]:
    """Return what a step leads to, and the derivatives of two functions of it in all inputs."""
    inputs = leaves(tensors(given), [t.requires_grad for t in tensors(given)])
    point, pair, settings = filled(given, inputs)
    following = step(point, pair, settings)
    moved = [p - point.parameters[name] for name, p in following.parameters.items()]
    state = tensors(following.optimizer_state)
    values = [*moved, *following.buffers.values(), *state]
    wanted = [t for t in inputs if t.requires_grad]
    for outputs in ([*following.parameters.values()], state):
        # Of theta_D^{k+1} alone, round-off may be all there is (Adam's first step): so twice.
        seeded = [t for t in outputs if t.grad_fn is not None]
        if seeded:
            seeds = [
                torch.arange(t.numel(), dtype=t.dtype, device=t.device).cos().view(t.shape)
                for t in seeded
            ]
            values += torch.autograd.grad(
                seeded, wanted, seeds, allow_unused=True, retain_graph=True, materialize_grads=True
            )
    return [value.detach() for value in values]


def perturbed(tensor: Tensor) -> Tensor:
    """Return a tensor that is off by a few units in the last place."""
    if not tensor.is_floating_point():
        return tensor
    pattern = torch.linspace(-8, 8, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    off = 1 + torch.finfo(tensor.dtype).eps * pattern.view(tensor.shape)
    return (tensor.detach() * off).requires_grad_(tensor.requires_grad)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
