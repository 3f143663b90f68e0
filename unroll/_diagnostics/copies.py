"""Float64 copies of a loss, its D, its optimizer and its objective, for the self-check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_map

from unroll._functional import map_tensors, preserved
from unroll._loss import UnrolledGeneratorLoss
from unroll._optimizers import unwrapped_optimizers


def in_double(loss: UnrolledGeneratorLoss, mode: InDouble) -> UnrolledGeneratorLoss:
    """Return the loss on copies of D in float64, and of the optimizer with its state and the rest.

    These keep their type; in the mode they are read in float64.
    """
    optimizers = unwrapped_optimizers(loss.optimizer)
    memo: dict[int, Any] = {}
    for impl in (getattr(optimizer, "impl", optimizer) for optimizer in optimizers):
        if isinstance(impl, GradientTransformation):  # pure functions, which deepcopy breaks
            memo[id(impl)] = impl
    for p in loss.discriminator.parameters():  # whose hooks and attributes deepcopy drops
        twin = memo[id(p)] = nn.Parameter(double(p), p.requires_grad)
        twin._backward_hooks = p._backward_hooks
        vars(twin).update(map_tensors(double, vars(p)))
    parts = ("discriminator", "objective", "project", "transform_gradients")
    given = {name: getattr(loss, name) for name in parts}
    given["optimizer"] = optimizers if isinstance(loss.optimizer, list) else optimizers[0]
    with mode:
        copies = {name: _copied(name, part, memo) for name, part in given.items()}
    settings = ("unroll_steps", "stop_gradient", "average", "checkpoint")
    copies |= {name: getattr(loss, name) for name in settings}
    copied = UnrolledGeneratorLoss(**copies, sync=False)  # they are this rank's alone
    copied._moving = copy.copy(loss._moving)
    return copied


@contextmanager
def standing_in(twin: nn.Module, module: nn.Module) -> Iterator[None]:
    """Let a module have the tensors of its copy: an objective or a hook may close over it."""
    with preserved(module):
        for own, copied in zip(module.modules(), twin.modules(), strict=True):
            vars(own).update(_parameters=copied._parameters, _buffers=copied._buffers)
        yield


def _copied(name: str, part: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(part, memo)
    except Exception as error:
        raise TypeError(
            f"{name}: must be what copy.deepcopy can copy, for check_gradients to work on a copy; "
            f"it cannot ({type(error).__name__}: {error}). Keep locks, loggers and writers out of "
            "it, or give them a __deepcopy__."
        ) from error


def double(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, detached and in float64 if it is floating-point."""
    tensor = tensor.detach().clone()
    return tensor.double() if tensor.is_floating_point() else tensor


_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_WIDE = {**dict.fromkeys(_NARROW, torch.float64), torch.complex64: torch.complex128}
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]


class InDouble(TorchFunctionMode):
    """A context in which code that was written for another precision computes in float64.

    Casts and dtypes that it names become float64, and every tensor that it reaches (an attribute, a
    closure, a global) is read, and changed in place, as a float64 twin. Tensors in float64 say that
    they are of ``dtype``, the original's, so that assertions hold.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}
        self.rounding: set[str] = set()  # operations that return something else all the same

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``func`` on twins."""
        if func == Tensor.__deepcopy__:  # refuses CSR, and tensors in a graph: torchopt's states
            given = args[0]
            if given.is_leaf and given.layout == torch.strided:
                return func(*args)
            return given.detach().clone().requires_grad_(given.requires_grad)
        args, named = tree_map(self._wide, cast(Any, (args, kwargs or {})))
        if func == _DTYPE:
            found = func(*args)
            return self.dtype if found == torch.float64 else found
        return args[0].double() if func in _CASTS else func(*args, **named)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in _WIDE:
            if value.grad_fn is not None:
                self.rounding.add(value.grad_fn.name())
            twin = (value, value.to(_WIDE[value.dtype]))
            return self.twins.setdefault(id(value), twin)[1]
        return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value
