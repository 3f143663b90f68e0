"""A function that keeps its inputs only and runs again in the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unroll._functional import map_tensors, preserved, tensors
from unroll._look_ahead import Point
from unroll._modes.adjoint import filled, leaves, recorded
from unroll._probes import ends
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
        template, device = _emptied(given), next(module.parameters()).device
        surroundings, found, result = _surroundings(module, also, device), list[Any](), list[R]()

        def forward(inputs: Any, needed: Any) -> Any:
            points = leaves(inputs, needed)
            # The optimizer's step needs no graph here. D's gradients get theirs, as in the second
            # run: without, other kernels round half precision otherwise.
            first = function(*filled(template, points))
            result.append(_emptied(first))
            moved: set[int] = set()
            if isinstance(first, Point):
                constants = {id(t) for t in points if not t.requires_grad}
                moved = {id(t) for t in tensors((first.parameters, first.optimizer_state))}
                moved -= constants
            flags = [
                t.requires_grad or (id(t) in moved and t.is_floating_point())
                for t in tensors(first)
            ]
            outputs = [t.detach() for t in tensors(first)]
            # Not on a GPU: sums may come in another order there, which Adam's first steps amplify.
            exact = device.type == "cpu"
            pairs = zip(outputs, flags, strict=True)
            found.extend(o.detach() if exact or not flag else None for o, flag in pairs)
            return outputs, flags, inputs

        def backward(saved: Any, tangents: Any, needed: Any) -> Any:
            inputs = leaves(saved, needed)
            with torch.enable_grad(), surroundings():
                outputs = tensors(function(*filled(template, inputs)))
            _check_repeated(found, outputs)
            pairs = zip(outputs, tangents, strict=True)
            seeded = [(o, g) for o, g in pairs if o.requires_grad and g is not None]
            gradients = iter(
                torch.autograd.grad(
                    [o for o, _ in seeded],
                    [i for i in inputs if i.requires_grad],
                    [g for _, g in seeded],
                    allow_unused=True,
                )
            )
            return [next(gradients) if need else None for need in needed]

        way_out = "Set checkpoint=False for this loss."
        outputs = recorded("checkpoint", way_out, forward, backward, tensors(given))
        return filled(result[0], outputs)  # type: ignore[no-any-return]

    return again


def _surroundings(
    module: nn.Module, also: Sequence[object], device: torch.device
) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which random numbers and modes, of D and of torch, are those of now."""
    state, training = random_state(device), [part.training for part in module.modules()]
    # Such as a default device, which torch switches off while it runs a backward pass.
    stack: Any = torch.overrides._get_current_function_mode_stack
    modes, kind = stack(), device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def again() -> Iterator[None]:
        with (
            replayed(state, device),
            preserved(module, also),
            torch.autocast(kind, dtype, enabled, cached),
            ExitStack() as contexts,
        ):
            for mode in modes:
                contexts.enter_context(copy.copy(mode))
            for part, trained in zip(module.modules(), training, strict=True):
                part.training = trained
            yield

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
    wanted = [t for t in inputs if t.requires_grad]
    how: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    results: list[list[Tensor]] = []
    slopes: list[Sequence[Tensor]] = []  # which may depend on state that values do not show
    with preserved(module, also):
        for _ in range(2):  # one after the other, as steps are; what D counts, it counts on
            with replayed(state, device), torch.enable_grad():
                results.append(tensors(function(*filled(given, inputs))))
                total = [t.sum() for t in results[-1] if t.requires_grad]
                slopes.append(torch.autograd.grad(total, wanted, **how) if total else ())
    _check_repeated([*results[0], *slopes[0]], [*results[1], *slopes[1]])
    of_both = set(ends(results[0], ())) & set(ends(results[1], ()))
    for leaf in of_both - set(inputs):
        raise RuntimeError(
            "checkpoint: the look-ahead uses a tensor that requires a gradient and is no part of "
            f"the batch (shape {tuple(leaf.shape)}; in the objective or in project=), whose "
            "gradient a recomputed step would lose. Pass it in the batch, detach it, or set "
            "checkpoint=False."
        )


def _check_repeated(first: Sequence[Tensor | None], second: Sequence[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        # Sparse ones are D's constants, and torch cannot compare them. The first test is faster.
        if a is None or a.layout != torch.strided or torch.equal(a, b):
            continue
        if not torch.allclose(a, b, equal_nan=True):
            raise RuntimeError(
                "checkpoint: a look-ahead step must give the same result when it runs again in the "
                "backward pass, but D's loss, update or buffers differ. D, the objective, project= "
                "or a gradient hook keeps state of its own, was changed in between, or draws from "
                "another generator than torch's global one. Register buffers, or set "
                "checkpoint=False."
            )


def _emptied(value: Any) -> Any:
    return map_tensors(lambda _: _PLACEHOLDER, value)
