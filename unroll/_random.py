"""The state of the generators that dropout draws from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def every_random_state(device: torch.device) -> tuple[RandomState, Any, Any]:
    """Return the states of torch's, Python's and NumPy's global generators."""
    numpy = sys.modules.get("numpy")
    return random_state(device), random.getstate(), numpy and numpy.random.get_state()


def set_every_random_state(state: tuple[RandomState, Any, Any], device: torch.device) -> None:
    """Put all of them back to an earlier state."""
    set_random_state(state[0], device)
    random.setstate(state[1])
    if state[2] is not None:
        sys.modules["numpy"].random.set_state(state[2])


@contextmanager
def replayed(state: RandomState, device: torch.device) -> Iterator[None]:
    """Draw from ``state`` again, and go on afterwards as if nothing had been drawn."""
    now = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(now, device)
