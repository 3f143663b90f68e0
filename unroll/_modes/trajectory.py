"""K steps as one function of autograd: the code of a step K times, and back by its adjoint."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unroll._modes.backend import CompiledStep


class Entered(NamedTuple):
    """The first step of a trajectory, which went through ``torch.compile``."""

    code: CompiledStep
    inputs: Sequence[Any]
    found: Sequence[Any]  # outputs, then what is saved


class Chain(NamedTuple):
    """How steps hang together. A step finds its inputs in a pool, by number."""

    code: CompiledStep
    carried: Sequence[int]  # the output that becomes each of the first entries; negative: it stays
    places: Sequence[Sequence[int]]  # of the inputs of each step, in the pool
    every: bool  # whether the outputs of all steps are wanted, or the last ones


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
    count, fixed = len(code.differentiable), len(leaves) - len(pairs[0])
    source = {id(t): i for i, t in enumerate(leaves)}
    output = {id(t): i for i, t in enumerate(found[:count])}
    results = [output[id(t)] if id(t) in output else ~source[id(t)] for t in result]
    carried = results[:-1]
    for i, (j, leaf) in enumerate(zip(carried, leaves, strict=False)):
        chained &= j == ~i if j < 0 else leaf.requires_grad or not code.differentiable[j]
    if not chained:
        pairs, carried = pairs[:1], []

    others = [t for t in inputs if id(t) not in source]  # constants of the game
    pool, starts = [*own[:fixed], *others], dict[int, int]()
    for pair in pairs:
        if id(pair) not in starts:
            starts[id(pair)] = len(pool)
            pool += pair
    other = iter(range(fixed, len(pool)))
    places = [source[id(t)] if id(t) in source else ~next(other) for t in inputs]
    each = {
        key: [~i if i < 0 else i if i < fixed else i - fixed + start for i in places]
        for key, start in starts.items()
    }
    chain = Chain(code, carried, [each[id(pair)] for pair in pairs], every)
    steps: list[Sequence[Any]] = []
    outputs = _Trajectory.apply(chain, found, steps, *pool)
    points = [
        [own[~i] if i < 0 else outputs[n + i] for i in results[:-1]]
        for n in range(0, len(outputs), count)
    ]
    return points, [step[results[-1]] for step in steps]


class _Trajectory(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chain: Chain, first: Sequence[Any], steps: list[Sequence[Any]], *pool: Any
    ) -> tuple[Tensor, ...]:
        code, count = chain.code, len(chain.code.differentiable)
        carry, rest, kept = pool[: len(chain.carried)], pool[len(chain.carried) :], list[Any]()
        for k, places in enumerate(chain.places):
            available = (*carry, *rest)
            found = code.forward([available[i] for i in places]) if k else first
            kept += found[count:]
            steps.append(found[:count])
            pairs = zip(chain.carried, carry, strict=True)
            carry = tuple([old if i < 0 else found[i] for i, old in pairs])
        wanted = steps if chain.every else steps[-1:]
        flags = code.differentiable * len(wanted)
        outputs = tuple(t for step in wanted for t in step)
        # Not as attributes: an output that is saved, too, would keep its graph alive.
        ctx.numbers = [None if isinstance(t, Tensor) else t for t in kept]
        ctx.save_for_backward(*[t for t in kept if isinstance(t, Tensor)])
        ctx.chain, ctx.like = chain, [t.detach() for t in steps[-1]]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *[t for t, flag in zip(outputs, flags, strict=True) if not flag]
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "compile: f_K has first derivatives only, because compiled code has no others; "
                "create_graph=True asked for more. Set compile=False for this loss."
            )
        chain: Chain = ctx.chain
        saved, steps = iter(ctx.saved_tensors), len(chain.places)
        kept = [next(saved) if n is None else n for n in ctx.numbers]
        size, count = len(kept) // steps, len(ctx.like)
        outer: list[Tensor | None] = [*grads]
        if not chain.every:
            outer = [*[None] * count * (steps - 1), *grads]
        flagged = [i for i, flag in enumerate(chain.code.differentiable) if flag]
        total: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
        for k in reversed(range(steps)):
            tangents = outer[k * count : (k + 1) * count]
            if k < steps - 1:
                for place, i in enumerate(chain.carried):
                    if i >= 0:
                        tangents[i], total[place] = _sum(tangents[i], total[place]), None
            pairs = [(tangents[i], ctx.like[i]) for i in flagged]
            dense = [torch.zeros_like(like) if t is None else t.contiguous() for t, like in pairs]
            found = chain.code.adjoint([*kept[k * size : (k + 1) * size], *dense])
            for place, gradient in zip(chain.places[k], found, strict=True):
                if gradient is not None:
                    total[place] = _sum(total[place], gradient)
        return None, None, None, *total


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
