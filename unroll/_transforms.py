"""Clipping, as a transform of D's gradients in every look-ahead step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipGradNorm:
    """Clip the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` does.

    For ``transform_gradients=``. The derivative of the norm itself is kept.

    Args:
        max_norm: The largest norm, over all gradients that there are.
        norm_type: Of the norm, infinity included. Default 2.

    Example:
        >>> import torch, unroll
        >>> unroll.ClipGradNorm(1.0)({"weight": torch.tensor([3.0, 4.0])})["weight"]
        tensor([0.6000, 0.8000])
    """

    max_norm: float
    norm_type: float = 2.0

    def __call__(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients, scaled where their norm is above the largest."""
        device = next(iter(gradients.values())).device
        each = [torch.linalg.vector_norm(g, self.norm_type) for g in gradients.values()]
        norm = torch.linalg.vector_norm(torch.stack([n.to(device) for n in each]), self.norm_type)
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return {name: g * scale.to(g.device) for name, g in gradients.items()}


@dataclass(frozen=True)
class ClipGradValue:
    """Clip every element of the gradients, as ``torch.nn.utils.clip_grad_value_`` does.

    For ``transform_gradients=``.

    Args:
        value: The largest absolute value.

    Example:
        >>> import torch, unroll
        >>> unroll.ClipGradValue(1.0)({"weight": torch.tensor([0.5, -4.0])})["weight"]
        tensor([ 0.5000, -1.0000])
    """

    value: float

    def __call__(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients, clipped."""
        return {name: g.clamp(-self.value, self.value) for name, g in gradients.items()}
