"""What the K look-ahead steps lead to, as an object that is called like D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchopt.pytree import tree_map

from unroll._autograd_fixes import recomputation_refused
from unroll._functional import Functional, preserved
from unroll._look_ahead import Game, Point


@dataclass(frozen=True, eq=False, repr=False)
class UnrolledDiscriminator:
    """What K look-ahead steps lead to: callable like D, at theta_D^K.

    Attributes:
        parameters: Every parameter name of the unwrapped D, with its tensor in theta_D^K, of the
            parameter's shape and dtype. In the graph of the fakes, unless ``stop_gradient`` is set
            or nothing required a gradient.
        buffers: Every buffer name of D, with its tensor after the K steps, detached.
        optimizer_state: The optimizer's state after the K steps, in the optimizer's own form: what
            a torchopt transformation's ``update`` returned, a tuple of those for a torchopt
            optimizer, a mapping from parameter names to states for a ``torch.optim`` one; of a list
            of optimizers, a list.
        losses: D's loss before each step, shape ``(K,)``, detached.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer_state: Any
    losses: Tensor
    _module: nn.Module = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``D(*args, **kwargs)`` at theta_D^K; neither D nor the buffers change."""
        with preserved(self._module), recomputation_refused():
            functional = Functional(self._module)
            return functional(lambda d: d.forward(*args, **kwargs), self.parameters, self.buffers)[
                0
            ]

    def __repr__(self) -> str:
        """Return a line: what D is, how far it looked ahead, and its losses on the way."""
        losses = ", ".join(f"{loss:.4g}" for loss in self.losses.tolist())
        return (
            f"UnrolledDiscriminator({type(self._module).__name__} with "
            f"{len(self.parameters)} parameters, {len(self.losses)} steps ahead, "
            f"losses=[{losses}])"
        )


def unrolled(
    game: Game, point: Point, losses: Sequence[Tensor], *, in_graph: bool
) -> UnrolledDiscriminator:
    """Return D at a point; of constants, unless it is in the graph of the fakes."""

    def keep(value: Any) -> Any:
        return value if in_graph or not isinstance(value, Tensor) else value.detach()

    nothing = next(iter(point.parameters.values())).new_empty(0)
    return UnrolledDiscriminator(
        parameters={name: keep(p) for name, p in point.parameters.items()},
        buffers={name: b.detach().clone() for name, b in point.buffers.items()},
        optimizer_state=tree_map(keep, game.optimizer.export(point.optimizer_state)),
        losses=torch.stack([*losses]) if losses else nothing,
        _module=game.discriminator.module,
    )
