"""How compiled steps are compiled: by Inductor, with products that it can fuse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

FEW = 4  # terms or columns of a matrix product that are worth writing out


def inductor(graph: Any, inputs: Sequence[Any]) -> Any:
    """Compile a graph and its adjoint, as a backend of ``torch.compile``."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    # Random numbers are those of the eager step; convolutions keep their layout, which saves
    # half of the kernels and of the time to compile them.
    settings = {"fallback_random": True, "layout_optimization": False}
    with config.patch(settings):
        table = dict(select_decomp_table())
    table |= {torch.ops.aten.mm.default: product, torch.ops.aten.addmm.default: product_and_bias}
    return compile_fx(graph, inputs, decompositions=table, config_patches=settings)


def product(a: Tensor, b: Tensor) -> Any:
    """Return ``a @ b`` in operations that fuse with others, where BLAS is slow.

    The first layer of a D on points, the last one of any D, and their derivatives are products with
    a dimension of one or two, for which BLAS takes as long as for one of eight.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    exact = a.dtype in (torch.float32, torch.float64)  # others are added up in higher precision
    if a.device.type != "cpu" or not exact or min(rows, inner, columns) == 0:
        return NotImplemented
    if inner <= FEW:
        return reduce(torch.add, (a[:, i : i + 1] * b[i : i + 1] for i in range(inner)))
    if columns == 1:
        return (a * b[:, 0]).sum(1, keepdim=True)
    if rows == 1:
        return (a[0, :, None] * b).sum(0, keepdim=True)
    if max(rows, columns) <= FEW:
        return (a[:, :, None] * b).sum(1)
    if columns <= FEW:
        return torch.ops.aten.mm.default(b.t(), a.t()).t()
    return NotImplemented


def product_and_bias(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    """Return ``bias + a @ b`` in the same way."""
    found = product(a, b) if beta == 1 and alpha == 1 else NotImplemented
    return found if found is NotImplemented else bias + found
