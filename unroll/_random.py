"""The state of the generators that dropout draws from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RandomState = tuple[Tensor, Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """Return the states of torch's global generators on the CPU and on ``device``."""
    if device.type == "cpu":
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Put the generators back to an earlier state."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)


@contextmanager
def replayed(state: RandomState, device: torch.device) -> Iterator[None]:
    """Draw from ``state`` again, and go on afterwards as if nothing had been drawn."""
    now = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(now, device)
