"""Operations of torch as those that compiled code consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from unroll._autograd_fixes import weight_norm

FEW = 4  # terms or columns of a matrix product that are worth writing out
# tanh(z) / z = 1 + z^2 p(z^2) / q(z^2), of least relative error up to z = 4.52.
TANH_NUMERATOR = (-0.333332368, -0.015369781, -3.96417718e-06)
TANH_DENOMINATOR = (1.0, 0.446099413, 0.0165571174)


def convolution_twice(
    input_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    gradient: Tensor,
    weight: Tensor,
    input: Tensor,
    *how: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return what PyTorch's double backward of a convolution does, for any length of a batch.

    PyTorch's own reads the sizes, so that the code would serve one length alone.
    """
    aten, how = torch.ops.aten, how[:-1]  # the last one says what is wanted
    parts, of_input, of_weight = list[Tensor](), None, None
    if input_tangent is not None:
        parts.append(aten.convolution(input_tangent, weight, None, *how))
        found = gradient, input_tangent, weight, None, *how, (False, True, False)
        of_weight = aten.convolution_backward(*found)[1]
    if weight_tangent is not None:
        parts.append(aten.convolution(input, weight_tangent, None, *how))
        found = gradient, input, weight_tangent, None, *how, (True, False, False)
        of_input = aten.convolution_backward(*found)[0]
    if bias_tangent is not None:
        parts.append(bias_tangent.view(-1, *[1] * (gradient.dim() - 2)).expand_as(gradient))
    return reduce(torch.add, parts) if parts else None, of_input, of_weight


def product(a: Tensor, b: Tensor) -> Any:
    """Return ``a @ b``, of batches too, in operations that fuse with others, where BLAS is slow.

    The first layer of a D on points, the last one of any D, and their derivatives are products with
    a dimension of one or two, for which BLAS takes as long as for one of eight. Sums run over the
    long side, along rows, and the vectors of the processor along columns.
    """
    (rows, inner), columns = a.shape[-2:], b.shape[-1]
    exact = a.dtype in (torch.float32, torch.float64)  # others are added up in higher precision
    # Comparisons of a batch's length with anything but a constant would hold for that length alone.
    if a.device.type != "cpu" or not exact or rows == 0 or inner == 0 or columns == 0:
        return NotImplemented
    if inner <= FEW:
        b = _in_rows(b)
        parts = (a[..., i : i + 1] * b[..., i : i + 1, :] for i in range(inner))
        return reduce(torch.add, parts)
    if columns == 1:
        return (a * b.mT).sum(-1, keepdim=True)
    if rows <= FEW:
        return torch.stack([(a[..., i, :, None] * b).sum(-2) for i in range(rows)], -2)
    if columns <= FEW:
        of_b = _in_rows(b.mT)
        return torch.stack([(a.mT * of_b[..., i, :, None]).sum(-2) for i in range(columns)], -1)
    return NotImplemented


def _in_rows(matrix: Tensor) -> Tensor:
    """Return a matrix whose rows lie in memory, a small copy that saves a third of a loop's time.

    Loops along rows that are read with a stride, as the weights of a transposed layer are, do not
    vectorise; and Inductor would move an ordinary copy into the loop.
    """
    stride = matrix.contiguous().stride()
    return torch.ops.prims.inductor_force_stride_order(matrix, stride)  # type: ignore[no-any-return]


def product_and_bias(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    """Return ``bias + a @ b`` in the same way."""
    found = product(a, b) if beta == 1 and alpha == 1 else NotImplemented
    return found if found is NotImplemented else bias + found


def tanh(x: Tensor) -> Any:
    """Return ``x.tanh()`` in operations that vectorise and fuse; Sleef's takes four times as long.

    With t = tanh(x / 2) as a rational function of least relative error, tanh(x) = 2 t / (1 + t^2),
    which is insensitive to t where t is near 1. At most 4 units in the last place are off.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return NotImplemented
    half = (0.5 * x).clamp(-4.52, 4.52)  # beyond, the result is 1 in float32
    square = half * half
    numerator = _polynomial(square, TANH_NUMERATOR)
    denominator = _polynomial(square, TANH_DENOMINATOR)
    t = half + half * (square * numerator / denominator)
    return ((t + t) / (1 + t * t)).clamp(-1, 1)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    *lower, highest = coefficients
    return reduce(lambda sum_, c: sum_ * x + c, reversed(lower), torch.full_like(x, highest))


# Those that torch composes of others, and in which it loses a derivative or reads sizes.
COMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._convolution_double_backward.default: convolution_twice,
    torch.ops.aten._weight_norm.default: weight_norm,
}
# Those whose code is slow, and one that the partitioner of torch 2.7 cannot take.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._assert_tensor_metadata.default: lambda *_, **__: None,
    torch.ops.aten.mm.default: product,
    torch.ops.aten.bmm.default: product,
    torch.ops.aten.addmm.default: product_and_bias,
    torch.ops.aten.baddbmm.default: product_and_bias,
    torch.ops.aten.tanh.default: tanh,
}
