"""D at some theta_D^k: what objectives get, and what the look-ahead returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from unroll.derivatives import discriminator_forward
from unroll.stateless import Batch, Stateless, held


class Point(NamedTuple):
    """Where the look-ahead stands after k steps."""

    parameters: Mapping[str, Tensor]  # theta_D^k
    buffers: Mapping[str, Tensor]
    optimizer_state: Any
    loss: Tensor | None = None  # D's before the step that led here, detached


def start(module: Stateless, optimizer_state: Any = None) -> Point:
    """Return theta_D^0 = theta_D (Eq. 6), apart from what the user holds."""
    parameters = {name: p.detach().clone() for name, p in module.parameters.items()}
    buffers = {name: b.detach().clone() for name, b in module.buffers.items()}
    return Point(parameters, buffers, optimizer_state)


class PureModule(Protocol):
    """An ``nn.Module`` as a function of its parameters and buffers."""

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return ``module(*args, **kwargs)`` and the buffers that it leaves behind."""
        ...


class At:
    """D at some theta_D^k: the pure callable that objectives get. Its buffers evolve."""

    def __init__(
        self,
        module: PureModule,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *,
        twice: bool = False,
        watched: bool = True,
    ) -> None:
        self.module, self.parameters, self.buffers = module, parameters, buffers
        self.twice, self.watched = twice, watched

    def __call__(self, batch: Batch) -> Any:
        """Return D(x) for a tensor, D(*x) for a tuple, D(**x) for a mapping."""
        if isinstance(batch, Mapping):
            return self.forward(**batch)
        return self.forward(*batch) if isinstance(batch, tuple) else self.forward(batch)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``D(*args, **kwargs)``."""
        with discriminator_forward(twice=self.twice, watched=self.watched):
            output, self.buffers = self.module(self.parameters, self.buffers, args, kwargs)
        return output


@dataclass(frozen=True, eq=False)
class UnrolledDiscriminator:
    """What K look-ahead steps lead to: callable like D, at theta_D^K.

    Attributes:
        parameters: Every parameter name of the unwrapped D, with its tensor in theta_D^K. In the
            graph of the fakes, unless ``stop_gradient`` is set or nothing required a gradient.
        buffers: Every buffer name of D, with its tensor after the K steps, detached.
        optimizer_state: The optimizer's state after the K steps, in the optimizer's own form: what
            a torchopt transformation's ``update`` returned, a tuple of those for a torchopt
            optimizer, a mapping from parameter names to states for a ``torch.optim`` one.
        losses: D's loss before each step, shape ``(K,)``, detached.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer_state: Any
    losses: Tensor
    _module: nn.Module = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``D(*args, **kwargs)`` at theta_D^K; neither D nor the buffers change."""
        with held(self._module):
            d = At(Stateless(self._module), self.parameters, self.buffers)
            return d.forward(*args, **kwargs)
