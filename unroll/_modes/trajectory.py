"""K steps as one node of autograd: the code of a step K times, and back by its adjoint."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unroll._modes.adjoint import recorded
from unroll._modes.backend import CompiledStep


class Entered(NamedTuple):
    """The first step of a trajectory, which went through ``torch.compile``."""

    code: CompiledStep
    inputs: Sequence[Any]
    found: Sequence[Any]  # outputs, then what is saved


def trajectory(
    entered: Entered,
    leaves: Sequence[Tensor],
    own: Sequence[Tensor],
    result: Sequence[Tensor],
    pairs: Sequence[Sequence[Tensor]],
    *,
    chained: bool,
    every: bool,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return the results of the last step, or of every one, and D's losses.

    Args:
        entered: The first step.
        leaves: What it got: what is carried on, settings, and the pair.
        own: The tensors of which ``leaves`` are detached.
        result: What it gave: what is carried on, and D's loss.
        pairs: What the steps get; one step is taken where its code does not serve the next.
        chained: Whether the results have the form of what is carried on.
        every: Whether the results of all steps are wanted.
    """
    code, inputs, found = entered
    first = [found]  # which backward must not hold
    source = {id(t): i for i, t in enumerate(leaves)}
    output = {id(t): i for i, t in enumerate(found[: len(code.differentiable)])}
    # The output that becomes each of the first leaves in the next step; negative: it stays.
    *carried, loss = [output[id(t)] if id(t) in output else ~source[id(t)] for t in result]
    for i, (j, leaf) in enumerate(zip(carried, leaves, strict=False)):
        chained &= j == ~i if j < 0 else leaf.requires_grad or not code.differentiable[j]
    pairs = pairs if chained else pairs[:1]
    # The pool of all that steps read: what is carried on, settings, pairs, constants of the game.
    constants = [t for t in inputs if id(t) not in source]
    source |= {id(t): len(leaves) + i for i, t in enumerate(constants)}
    width, count = len(pairs[0]), len(pairs)
    fixed = len(leaves) - width
    keys = [tuple(map(id, pair)) for pair in pairs]
    distinct = dict(zip(keys, pairs, strict=True))  # one for all steps, unless they are re-sampled
    numbers = {key: number for number, key in enumerate(distinct)}

    def slot(i: int, k: int) -> int:
        """Return where the pool has what is the ``i``-th of leaves and constants in step ``k``."""
        before = numbers[keys[k]] if i < len(leaves) else len(distinct) - 1
        return i if i < fixed else i + width * before

    slots = [[slot(source[id(t)], k) for t in inputs] for k in range(count)]
    flags, losses, like = code.differentiable, list[Tensor](), list[Tensor]()

    def forward(pool: Any, needed: Any) -> Any:  # noqa: ARG001
        carry, rest = pool[: len(carried)], pool[len(carried) :]
        saved, outputs = list[Any](), list[Sequence[Tensor]]()
        for of_step in slots:
            readable = (*carry, *rest)
            found = first.pop() if first else code.forward([readable[i] for i in of_step])
            outputs.append(found[: len(flags)])
            saved += found[len(flags) :]
            losses.append(found[loss])
            moved = zip(carried, carry, strict=False)
            carry = tuple([t if i < 0 else found[i] for i, t in moved])
        like.extend(t.detach() for t in outputs[-1])
        wanted = outputs if every else outputs[-1:]
        return [t for step in wanted for t in step], flags * len(wanted), saved

    def backward(saved: Any, tangents: Any, needed: Any) -> Any:
        size = len(saved) // count
        outer = [*[None] * (count * len(flags) - len(tangents)), *tangents]
        total: list[Tensor | None] = [None] * len(needed)
        for k in reversed(range(count)):
            of_step = outer[k * len(flags) : (k + 1) * len(flags)]
            if k < count - 1:
                for i, j in enumerate(carried):
                    if j >= 0:
                        of_step[j], total[i] = _sum(of_step[j], total[i]), None
            dense = [
                torch.zeros_like(t) if tangent is None else tangent.contiguous()
                for tangent, t, flag in zip(of_step, like, flags, strict=True)
                if flag
            ]
            gradients = code.adjoint([*saved[k * size : (k + 1) * size], *dense])
            for i, gradient in zip(slots[k], gradients, strict=True):
                if gradient is not None:
                    total[i] = _sum(total[i], gradient)
        return total

    pool = [*own[:fixed], *(t for pair in distinct.values() for t in pair), *constants]
    way_out = "Set compile=False for this loss."
    outputs = recorded("compile", way_out, forward, backward, pool)
    points = [
        [own[~i] if i < 0 else outputs[n + i] for i in carried]
        for n in range(0, len(outputs), len(flags))
    ]
    return points, losses


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def form(value: Any) -> Hashable:
    """Return what a nested value has to share with another for the same code to serve both."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        return value.shape, strides, value.dtype, value.device
    if isinstance(value, Mapping):
        return type(value), *((key, form(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), *map(form, value)
    constant = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
    return (type(value), value) if constant else id(value)
