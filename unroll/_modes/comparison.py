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
    taken, drawn = [], []
    runs: tuple[tuple[Step, Given], ...] = (
        (compiled, given),
        (step, given),
        (step, map_tensors(perturbed, given)),
    )
    for function, inputs in runs:
        with replayed(state, device):
            taken.append(_Taken(function, inputs))
            drawn.append(tensors(random_state(device)))
    if not all(map(torch.equal, drawn[0], drawn[1])):
        raise RuntimeError("it draws other random numbers")
    meant = _compared([one.values for one in taken])
    try:
        _compared([one.derivatives([True] * len(meant)) for one in taken])
    except RuntimeError:
        # What is round-off alone has derivatives that are: those of a bias before BatchNorm, whose
        # gradient is zero and which Adam moves all the same, outweigh all others.
        _compared([one.derivatives(meant) for one in taken])


def _compared(found: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Compare what compiled code, the step and the nudged step have; say what is no round-off."""
    meant = []
    for ours, eager, nudged in zip(*found, strict=True):
        error, norm, noise = _norm(ours - eager), _norm(eager), _norm(nudged - eager)
        if not error <= 1e-3 * norm + 10 * noise:
            raise RuntimeError(f"its result is off by {error:.1e} in {norm:.1e}")
        meant.append(noise <= 0.1 * norm)
    return meant


class _Taken:
    """A step that was taken: what it leads to, and derivatives of that in all inputs."""

    def __init__(self, step: Step, given: Given) -> None:
        inputs = leaves(tensors(given), [t.requires_grad for t in tensors(given)])
        point, pair, settings = filled(given, inputs)
        following = step(point, pair, settings)
        moved = [p - point.parameters[name] for name, p in following.parameters.items()]
        state = tensors(following.optimizer_state)
        self.wanted = [t for t in inputs if t.requires_grad]
        self.outputs = [*following.parameters.values()], state
        self.values = [t.detach() for t in (*moved, *state, *following.buffers.values())]

    def derivatives(self, meant: Sequence[bool]) -> list[Tensor]:
        """Return those of two sums over outputs that are ``meant``, of parameters and of the state.

        Of theta_D^{k+1} alone, round-off may be all there is (Adam's first step).
        """
        found, which = list[Tensor](), iter(meant)
        for outputs in self.outputs:
            seeded = [t for t in outputs if next(which) and t.grad_fn is not None]
            if seeded:
                seeds = [
                    torch.arange(t.numel(), dtype=t.dtype, device=t.device).cos().view(t.shape)
                    for t in seeded
                ]
                how: Any = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
                found += torch.autograd.grad(seeded, self.wanted, seeds, **how)
        return found


def perturbed(tensor: Tensor) -> Tensor:
    """Return a tensor that is off by a few units in the last place."""
    if not tensor.is_floating_point():
        return tensor
    pattern = torch.linspace(-8, 8, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    off = 1 + torch.finfo(tensor.dtype).eps * pattern.view(tensor.shape)
    return (tensor.detach() * off).requires_grad_(tensor.requires_grad)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
