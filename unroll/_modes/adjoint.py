"""Functions that bring their own adjoint, as one node of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unroll._functional import map_tensors


def recorded(
    argument: str,
    way_out: str,
    forward: Callable[..., tuple[Sequence[Tensor], Sequence[bool], Sequence[Any]]],
    backward: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Any],
) -> tuple[Tensor, ...]:
    """Return what ``forward`` makes of its inputs, in the graph.

    Neither function may hold an output: its graph would keep itself alive.

    Args:
        argument: What this is for, at the cost of second derivatives.
        way_out: What to do for second derivatives.
        forward: Of the inputs, and of which of them require a gradient, it returns the outputs,
            which of them have a derivative, and what ``backward`` needs.
        backward: Of that, of a tangent for each output (None for zero) and of which inputs require
            a gradient, it returns the gradients in the inputs.
        inputs: Tensors, and numbers.
    """
    outputs: tuple[Tensor, ...] = _Recorded.apply((argument, way_out), forward, backward, *inputs)
    return outputs


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, refusal: Any, forward: Any, backward: Any, *inputs: Any) -> Any:
        outputs, differentiable, saved = forward(inputs, ctx.needs_input_grad[3:])
        # Tensors not as attributes: an output that is saved, too, would keep its graph alive.
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in saved]
        ctx.save_for_backward(*[value for value in saved if isinstance(value, Tensor)])
        ctx.refusal, ctx.adjoint = refusal, backward
        ctx.set_materialize_grads(False)  # a zero into an infinite slope would be NaN
        flagged = zip(outputs, differentiable, strict=True)
        ctx.mark_non_differentiable(*[output for output, flag in flagged if not flag])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            argument, way_out = ctx.refusal
            raise RuntimeError(
                f"{argument}: f_K has first derivatives only, because its graph is not kept; "
                f"create_graph=True asked for more. {way_out}"
            )
        tensors = iter(ctx.saved_tensors)
        saved = [next(tensors) if number is None else number for number in ctx.numbers]
        return None, None, None, *ctx.adjoint(saved, tangents, ctx.needs_input_grad[3:])


def leaves(values: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Return the same tensors without a history; ``needed`` says which require gradients."""
    return [v.detach().requires_grad_(need) for v, need in zip(values, needed, strict=True)]


def filled(value: Any, with_: Sequence[Tensor]) -> Any:
    """Return a nested value with these tensors in place of its own."""
    iterator = iter(with_)
    return map_tensors(lambda _: next(iterator), value)
