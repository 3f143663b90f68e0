"""PyTorch functions whose higher derivatives are wrong or missing, and what the look-ahead uses.

Eq. 7 contains a gradient, so differentiating through it takes second derivatives of the
discriminator (third ones under a gradient penalty) and derivatives of the optimizer at points
where the square root has none. The replacements below have the same values, to round-off, and
derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def safe_sqrt(x: Tensor) -> Tensor:
    """Return ``x.sqrt()``, whose derivative is taken as 0 where ``x`` is 0.

    Adam's second moment is exactly zero for a dead ReLU unit (or when ``g * g`` underflows). There
    the slope of the square root is infinite, and ``inf * 0 = nan`` would reach the generator.
    """
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """PyTorch's third derivative, which a gradient penalty needs, is silently wrong."""
    dims = list(range(-len(normalized_shape), 0))
    x = input if input.dtype in (torch.float32, torch.float64) else input.float()
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y if torch.is_autocast_enabled(input.device.type) else y.to(input.dtype)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """PyTorch's double backward holds the norm of ``v`` constant."""
    dims = [d for d in range(v.dim()) if d != dim]  # dim = -1 means one norm over all of v
    return v * (g / v.square().sum(dims, keepdim=True).sqrt())


def _math_attention(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fused attention has no second derivative; PyTorch's ``MATH`` backend has."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return attention


def _without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    """CuDNN's recurrent layers have no second derivative; PyTorch's own have."""

    def recurrent(*args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return function(*args, **kwargs)

    return recurrent


_TWICE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch._weight_norm: _weight_norm,
    F.scaled_dot_product_attention: _math_attention(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _math_attention(F.multi_head_attention_forward),
    **{f: _without_cudnn(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}
_ROOT: dict[Callable[..., Any], Callable[..., Any]] = {
    f: safe_sqrt for f in (torch.sqrt, torch.sqrt_, Tensor.sqrt, Tensor.sqrt_)
}


class _Replacing(TorchFunctionMode):
    def __init__(self, table: dict[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


def twice_differentiable() -> TorchFunctionMode:
    """Return a context in which a discriminator's forward pass has right higher derivatives."""
    return _Replacing(_TWICE)


def differentiable_roots() -> TorchFunctionMode:
    """Return a context in which every square root is :func:`safe_sqrt`."""
    return _Replacing(_ROOT)
