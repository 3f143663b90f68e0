"""What PyTorch's derivatives lack, replaced where that is possible.

Eq. 7 contains a gradient, so differentiating through it takes second derivatives of the
discriminator (third ones under a gradient penalty) and derivatives of the optimizer at points
where the square root has none. The replacements below have the same values, to round-off, and
derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
    cudnn_enable: bool = True,  # noqa: ARG001
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


def _native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _, mean, rstd = torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
    return _layer_norm(input, normalized_shape, weight, bias, eps), mean, rstd


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """PyTorch's double backward holds the norm of ``v`` constant."""
    kept = dim if dim == -1 else dim % v.dim()  # -1 means one norm over all of v
    dims = [d for d in range(v.dim()) if d != kept]
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
    torch.native_layer_norm: _native_layer_norm,
    torch._weight_norm: _weight_norm,
    F.scaled_dot_product_attention: _math_attention(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _math_attention(F.multi_head_attention_forward),
    **{f: _without_cudnn(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}
_ROOT: dict[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(
    (torch.sqrt, Tensor.sqrt), safe_sqrt
)
_ROOT |= dict.fromkeys((torch.sqrt_, Tensor.sqrt_), lambda x: x.copy_(safe_sqrt(x)))


def _adagrad_where(condition: Tensor, *args: Any) -> Any:
    """Torchopt's Adagrad returns a constant 0 at a zero accumulator, where its step is g / eps."""
    if len(args) == 2 and isinstance(args[1], float) and args[1] == 0.0:
        condition = condition | (args[0] == 0.0)
    return torch.where(condition, *args)


def _power(x: Any, exponent: Any) -> Any:
    if isinstance(x, Tensor) and isinstance(exponent, float) and exponent == 0.5:
        return safe_sqrt(x)
    return torch.pow(x, exponent)


_ROOT |= dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _power)


class _Replacing(TorchFunctionMode):
    def __init__(self, table: dict[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


def right_derivatives() -> TorchFunctionMode:
    """Return the context of a forward pass of D that will be differentiated twice or more."""
    return _Replacing(_TWICE)


def differentiable_roots(*, adagrad: bool) -> TorchFunctionMode:
    """Return a context in which an optimizer has its right slope at a zero second moment."""
    return _Replacing(_ROOT | {torch.where: _adagrad_where} if adagrad else _ROOT)


RECOMPUTATION = (
    "discriminator: activation checkpointing inside D (and what else hooks saved tensors there, "
    "such as save_on_cpu) recomputes with D's real parameters, which gives a wrong gradient "
    "through the look-ahead. Switch torch.utils.checkpoint off in D while the generator's loss is "
    "computed; checkpoint=True of the loss saves the same memory."
)


@contextmanager
def recomputation_refused() -> Iterator[None]:
    """Refuse activation checkpointing: its second run would not find theta_D^k in D."""
    with ExitStack() as stack:
        # Torch refuses to switch hooks off within those of the user, around the call: these are
        # right, and what D does under them is not seen.
        with suppress(RuntimeError):
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTATION))
        yield


def inner_gradients(
    loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of D's loss, None where it does not depend on a parameter."""
    try:
        return torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error):  # the form of checkpointing that hooks no tensors
            raise RuntimeError(RECOMPUTATION) from error
        raise
