"""A look-ahead step that keeps its inputs only and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from unroll.inspection import graph
from unroll.stateless import Batch, held, map_tensors, tensors
from unroll.steps.randomness import random_state, replayed

_PLACEHOLDER = torch.empty(0)
P = TypeVar("P", contravariant=True)
R = TypeVar("R", covariant=True)


class Step(Protocol[P, R]):
    """What leads from a point of the look-ahead to the next, or to f; ``graph`` keeps its graph."""

    def __call__(self, point: P, fake: Batch, real: Batch, *, graph: bool) -> R:
        """Return the result; without a graph, it requires gradients where it would have one."""
        ...


def recomputed(
    step: Step[Any, R], module: nn.Module, also: Sequence[object], given: tuple[Any, Batch, Batch]
) -> R:
    """Return ``step(*given)`` with the same gradient, in the memory of its inputs.

    ``also`` is what is held with ``module`` in the second run.
    """
    run = _Run(step, module, also, given)
    outputs = _Recompute.apply(run, *tensors(given))
    result: R = filled(run.result, outputs)
    return result


def refuse_unrepeatable(
    step: Step[Any, Any], module: nn.Module, also: Sequence[object], given: tuple[Any, Batch, Batch]
) -> None:
    """Refuse a step whose second run would differ, or lose the gradient of a tensor.

    A tensor from elsewhere stands in the graphs of two runs; what a step makes for itself stands in
    one.
    """
    device = next(module.parameters()).device
    state = random_state(device)
    inputs = leaves(tensors(given), [t.requires_grad for t in tensors(given)])
    results: list[list[Tensor]] = []
    ends: list[dict[int, Tensor]] = []
    for _ in range(2):
        with replayed(state, device), held(module, also):
            results.append(tensors(step(*filled(given, inputs), graph=True)))
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
        if a is not None and not torch.allclose(a, b, equal_nan=True):
            raise RuntimeError(
                "checkpoint: a look-ahead step must give the same result when it runs again in the "
                "backward pass, but D's loss, update or buffers differ. D, the objective, project= "
                "or a gradient hook keeps state of its own, was changed in between, or draws from "
                "another generator than torch's global one. Register buffers, or set "
                "checkpoint=False."
            )


class _Run:
    """What the second run needs besides tensors: random numbers, modes, autocast."""

    def __init__(
        self,
        step: Step[Any, Any],
        module: nn.Module,
        also: Sequence[object],
        given: tuple[Any, Batch, Batch],
    ) -> None:
        self.step, self.module, self.also = step, module, also
        self.given = _emptied(given)
        self.result: Any = None
        self.found: list[Tensor | None] = []  # of the first run, what the second is compared with
        self.device = next(module.parameters()).device
        self.random_state = random_state(self.device)
        self.training = [submodule.training for submodule in module.modules()]
        kind = self.device.type
        self.autocast = (
            kind,
            torch.get_autocast_dtype(kind),
            torch.is_autocast_enabled(kind),
            torch.is_autocast_cache_enabled(),
        )

    def first(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        result = self.step(*filled(self.given, inputs), graph=False)
        self.result = _emptied(result)
        return tensors(result)

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with (
            replayed(self.random_state, self.device),
            held(self.module, self.also),
            torch.autocast(*self.autocast),
        ):
            for submodule, training in zip(self.module.modules(), self.training, strict=True):
                submodule.training = training
            return tensors(self.step(*filled(self.given, inputs), graph=True))


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)  # a zero into an infinite slope would be NaN
        ctx.save_for_backward(*inputs)
        found = run.first(leaves(inputs, ctx.needs_input_grad[1:]))
        outputs = tuple(t.detach() for t in found)
        constants = [o for o, t in zip(outputs, found, strict=True) if not t.requires_grad]
        # Elsewhere than on a CPU, sums may come in another order, which Adam's first steps amplify.
        exact = run.device.type == "cpu"
        run.found = [
            o.detach() if exact or not t.requires_grad else None
            for o, t in zip(outputs, found, strict=True)
        ]
        ctx.mark_non_differentiable(*constants)
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
        with torch.enable_grad():
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
