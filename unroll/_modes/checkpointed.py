"""A function that keeps its inputs only and runs again in the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unroll._functional import map_tensors, preserved, tensors
from unroll._look_ahead import Point
from unroll._probes import graph
from unroll._random import random_state, replayed

_PLACEHOLDER = torch.empty(0)
R = TypeVar("R")


def checkpointed(
    function: Callable[..., R], module: nn.Module, also: Sequence[object]
) -> Callable[..., R]:
    """Return a function with the same results and gradients, in the memory of its inputs.

    Args:
        function: A step, or f as a function of a point: of nested values with tensors.
        module: D, which is preserved while the function runs again.
        also: What is preserved with it, the summands of the objective.
    """

    def again(*given: Any) -> R:
        if not torch.is_grad_enabled():
            return function(*given)
        run = _Run(function, module, also, given)
        outputs = _Checkpoint.apply(run, *tensors(given))
        result: R = filled(run.result, outputs)
        return result

    return again


def refuse_unrepeatable(
    function: Callable[..., Any], module: nn.Module, also: Sequence[object], given: tuple[Any, ...]
) -> None:
    """Refuse a function whose second run would differ, or lose the gradient of a tensor.

    A leaf in both graphs existed before the runs; one in a single graph was made by its run.
    """
    device = next(module.parameters()).device
    state = random_state(device)
    inputs = leaves(tensors(given), [t.requires_grad for t in tensors(given)])
    results: list[list[Tensor]] = []
    ends: list[dict[int, Tensor]] = []
    for _ in range(2):
        with replayed(state, device), preserved(module, also), torch.enable_grad():
            results.append(tensors(function(*filled(given, inputs))))
        variables = [getattr(node, "variable", None) for node in graph(results[-1])]
        ends.append({id(v): v for v in variables if v is not None})
    _check_repeated(results[0], results[1])
    known = {id(t) for t in inputs}
    for name, leaf in ends[0].items():
        if name in ends[1] and name not in known:
            raise RuntimeError(
                "checkpoint: the look-ahead uses a tensor that requires a gradient and is no part "
                f"of the batch (shape {tuple(leaf.shape)}; in the objective or in project=), whose "
                "gradient a recomputed step would lose. Pass it in the batch, detach it, or set "
                "checkpoint=False."
            )


def _check_repeated(first: Sequence[Tensor | None], second: Sequence[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        if a is None or a.layout != torch.strided or torch.equal(a, b):  # which is faster
            continue
        if not torch.allclose(a, b, equal_nan=True):
            raise RuntimeError(
                "checkpoint: a look-ahead step must give the same result when it runs again in the "
                "backward pass, but D's loss, update or buffers differ. D, the objective, project= "
                "or a gradient hook keeps state of its own, was changed in between, or draws from "
                "another generator than torch's global one. Register buffers, or set "
                "checkpoint=False."
            )


class _Run:
    """What the second run needs besides tensors: random numbers, modes of D and of torch."""

    def __init__(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        also: Sequence[object],
        given: tuple[Any, ...],
    ) -> None:
        self.function, self.module, self.also = function, module, also
        self.given = _emptied(given)
        self.result: Any = None
        self.found: list[Tensor | None] = []  # of the first run, what the second is compared with
        self.device = next(module.parameters()).device
        self.random_state = random_state(self.device)
        self.training = [submodule.training for submodule in module.modules()]
        # Such as a default device, which torch switches off while it runs a backward pass.
        modes: Any = torch.overrides._get_current_function_mode_stack
        self.modes = modes()
        kind = self.device.type
        self.autocast = (
            kind,
            torch.get_autocast_dtype(kind),
            torch.is_autocast_enabled(kind),
            torch.is_autocast_cache_enabled(),
        )

    def first(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
        """Return the results, and which of them have a derivative.

        The optimizer's step needs no graph here. D's gradients get theirs, as in the second run:
        without, other kernels round half precision otherwise.
        """
        result = self.function(*filled(self.given, inputs))
        self.result = _emptied(result)
        found = tensors(result)
        if not isinstance(result, Point):
            return found, [t.requires_grad for t in found]
        constants = {id(t) for t in inputs if not t.requires_grad}
        moved = {id(t) for t in tensors((result.parameters, result.optimizer_state))} - constants
        return found, [t.requires_grad or (id(t) in moved and t.is_floating_point()) for t in found]

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the results with their graph."""
        with (
            torch.enable_grad(),
            replayed(self.random_state, self.device),
            preserved(self.module, self.also),
            torch.autocast(*self.autocast),
            ExitStack() as stack,
        ):
            for mode in self.modes:
                stack.enter_context(copy.copy(mode))
            for submodule, training in zip(self.module.modules(), self.training, strict=True):
                submodule.training = training
            return tensors(self.function(*filled(self.given, inputs)))


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)  # a zero into an infinite slope would be NaN
        ctx.save_for_backward(*inputs)
        found, differentiable = run.first(leaves(inputs, ctx.needs_input_grad[1:]))
        outputs = tuple(t.detach() for t in found)
        # Elsewhere than on a CPU, sums may come in another order, which Adam's first steps amplify.
        exact = run.device.type == "cpu"
        pairs = list(zip(outputs, differentiable, strict=True))
        run.found = [o.detach() if exact or not flag else None for o, flag in pairs]
        ctx.mark_non_differentiable(*[o for o, flag in pairs if not flag])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "checkpoint: f_K has first derivatives only, because its graph is not kept; "
                "create_graph=True asked for more. Set checkpoint=False for this loss."
            )
        needed = ctx.needs_input_grad[1:]
        inputs = leaves(ctx.saved_tensors, needed)
        outputs = ctx.run.again(inputs)
        _check_repeated(ctx.run.found, outputs)
        pairs = zip(outputs, grads, strict=True)
        seeded = [(o, g) for o, g in pairs if o.requires_grad and g is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in seeded],
                [i for i in inputs if i.requires_grad],
                [g for _, g in seeded],
                allow_unused=True,
            )
        )
        return None, *(next(found) if need else None for need in needed)


def leaves(values: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Return the same tensors without a history; ``needed`` says which require gradients."""
    return [v.detach().requires_grad_(need) for v, need in zip(values, needed, strict=True)]


def _emptied(value: Any) -> Any:
    return map_tensors(lambda _: _PLACEHOLDER, value)


def filled(value: Any, with_: Sequence[Tensor]) -> Any:
    """Return a value with these tensors in place of its own."""
    iterator = iter(with_)
    return map_tensors(lambda _: next(iterator), value)
