"""A look-ahead step in a form that ``torch.compile`` can trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from unroll._autograd_fixes import right_derivatives
from unroll._functional import Pair
from unroll._look_ahead import Game, update
from unroll._modes.backend import out_of_penalty
from unroll._objectives import Objective
from unroll._penalties import summands

Carried = tuple[dict[str, Tensor], dict[str, Tensor], Any]  # parameters, buffers, optimizer state


def traced_step(
    game: Game,
    whole: bool,
    floats: Sequence[Sequence[str]],
    reached: tuple[str, ...],
    carried: Carried,
    settings: Any,
    pair: Pair,
) -> tuple[Carried, Tensor]:
    """Return theta_D^{k+1} (Eq. 7), D's buffers and the optimizer's state; and D's loss.

    ``floats`` are those of :func:`floats_of` the objective, ``reached`` the parameters that the
    loss depends on. Without ``whole``, gradients are in place of theta_D^{k+1}.
    """
    theta, buffers, state = carried
    for part, names in zip(summands(game.objective), floats, strict=True):
        for name in names:  # inside of grad_and_value, torch takes them for constants
            torch.sym_float(getattr(part, name))

    def loss(moving: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        left = {**buffers}

        # In place of FunctionalDiscriminator, which torch 2.7 cannot trace.
        def discriminator(*args: Any, **kwargs: Any) -> Any:
            given: Any = args
            if len(args) == 1 and not kwargs:
                if isinstance(args[0], Mapping):
                    given, kwargs = (), {**args[0]}
                elif isinstance(args[0], tuple):
                    (given,) = args
            left.update({name: buffer.clone() for name, buffer in left.items()})
            tensors = {**theta, **moving}, left
            found = functional_call(game.discriminator.module, tensors, given, kwargs)
            left.update({name: out_of_penalty(buffer) for name, buffer in left.items()})
            return found

        with right_derivatives():
            return game.objective.discriminator_loss(discriminator, *pair), left

    differentiated = grad_and_value(loss, has_aux=True)
    found, (value, left) = differentiated({name: theta[name] for name in reached})
    if whole:
        found, state = update(game, theta, found, state, settings)
    return (found, left, state), value.detach()


def floats_of(objective: Objective) -> list[list[str]]:
    """Return the attributes of each summand that are floats, which may change from call to call."""
    attributes = [getattr(part, "__dict__", {}) for part in summands(objective)]
    return [[name for name, value in own.items() if type(value) is float] for own in attributes]
