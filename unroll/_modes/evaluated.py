"""f_0 with its gradient at once, for a D that recomputes itself in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unroll._functional import (
    Functional,
    FunctionalDiscriminator,
    Pair,
    map_tensors,
    tensors,
    views,
)
from unroll._look_ahead import Point, Value
from unroll._objectives import Objective


def evaluated(discriminator: Functional, objective: Objective) -> Value:
    """Return f as a function whose backward pass does not run D again.

    Activation checkpointing inside D finds theta_D^0 and private buffers in it as long as the call
    lasts; later it would find what the user has, and change it. So the gradient is taken meanwhile.
    """

    def value(point: Point, pair: Pair) -> Tensor:
        result: Tensor = _Evaluated.apply(discriminator, objective, point, pair, *tensors(pair))
        return result

    return value


class _Evaluated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        discriminator: Functional,
        objective: Objective,
        point: Point,
        pair: Pair,
        *inputs: Tensor,
    ) -> Tensor:
        needed = ctx.needs_input_grad[4:]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
        iterator = iter(leaves)
        batch = map_tensors(lambda _: next(iterator), pair)

        def differentiated(d: FunctionalDiscriminator) -> Tensor:
            f = objective.generator_loss(d, *views(batch))
            torch.autograd.backward(f)  # autograd.grad refuses the reentrant form
            return f

        with torch.enable_grad():
            f, _ = discriminator(differentiated, point.parameters, point.buffers)
        ctx.save_for_backward(*[torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
        return f.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        found = zip(ctx.saved_tensors, needed, strict=True)
        return None, None, None, None, *(grad * g if need else None for g, need in found)
