"""A look-ahead step in a form that ``torch.compile`` can trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from unroll._autograd_fixes import right_derivatives
from unroll._functional import Pair
from unroll._modes.backend import out_of_penalty
from unroll._objectives import Discriminator, Objective
from unroll._optimizers import InnerOptimizer
from unroll._penalties import Sum
from unroll._validation import Mapped, mapped


class Traceable:
    """``module`` as a pure function, in a form that ``torch.compile`` can trace."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self,
        function: Callable[[Discriminator], Any],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return ``function(D)`` with these tensors in D, and the buffers that it leaves behind."""
        left = {**buffers}

        def forward(*args: Any, **kwargs: Any) -> Any:
            left.update({name: buffer.clone() for name, buffer in left.items()})
            found = functional_call(self.module, ({**parameters}, left), args, kwargs)
            left.update({name: out_of_penalty(buffer) for name, buffer in left.items()})
            return found

        # As FunctionalDiscriminator, which torch 2.7 cannot trace.
        def unpacking(*args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and not kwargs:
                if isinstance(args[0], Mapping):
                    return forward(**args[0])
                if isinstance(args[0], tuple):
                    return forward(*args[0])
            return forward(*args, **kwargs)

        with right_derivatives():
            return function(unpacking), left


@dataclass(frozen=True)
class Played:
    """What compiled code is made of, besides tensors."""

    module: nn.Module
    objective: Objective
    numbers: tuple[tuple[str, ...], ...]  # where the objective has floats, as paths of attributes
    optimizer: InnerOptimizer | None  # none: the update runs as it is, outside
    transform_gradients: Mapped | None
    project: Mapped | None


Carried = tuple[dict[str, Tensor], dict[str, Tensor], Any]  # parameters, buffers, optimizer state


def traced_step(
    played: Played, reached: tuple[str, ...], carried: Carried, settings: Any, pair: Pair
) -> tuple[Carried, Tensor]:
    """Return theta_D^{k+1} (Eq. 7), D's buffers and the optimizer's state; and D's loss.

    Without an optimizer, the gradients are in place of theta_D^{k+1}.
    """
    theta, buffers, state = carried
    for path in played.numbers:  # inside of grad_and_value, torch takes them for constants
        torch.sym_float(reduce(getattr, path, played.objective))

    def loss(moving: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        objective = played.objective
        return Traceable(played.module)(
            lambda d: objective.discriminator_loss(d, *pair), {**theta, **moving}, buffers
        )

    differentiated = grad_and_value(loss, has_aux=True)
    found, (value, left) = differentiated({name: theta[name] for name in reached})
    if played.optimizer is not None:
        with torch.autocast(value.device.type, enabled=False):
            if played.transform_gradients is not None:
                found = mapped("transform_gradients", played.transform_gradients, found)
            found, state = played.optimizer.step(theta, found, state, settings)
            if played.project is not None:
                found = mapped("project", played.project, found)
    return (found, left, state), value.detach()


def numbers(objective: Any) -> tuple[tuple[str, ...], ...]:
    """Return the paths of attributes that lead to floats of an objective and of its summands."""
    if isinstance(objective, Sum):
        parts = ("first", "second")
        return tuple((n, *path) for n in parts for path in numbers(getattr(objective, n)))
    own = getattr(objective, "__dict__", {})
    return tuple((name,) for name, value in own.items() if type(value) is float)
