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
from torchopt.pytree import tree_leaves

from unroll._functional import preserved, tensors
from unroll._loss import UnrolledGeneratorLoss
from unroll._optimizers import unwrapped_optimizers


def in_double(loss: UnrolledGeneratorLoss) -> UnrolledGeneratorLoss:
    """Return the loss on float64 copies of D, the optimizer with its state, and the objective."""
    optimizers = unwrapped_optimizers(loss.optimizer)
    held: list[Any] = [tensors(vars(part)) for part in loss.discriminator.modules()]
    memo: dict[int, Any] = {}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            # Not the step count, which torch keeps in float32.
            states = optimizer.state.values()
            held += [v for state in states for k, v in state.items() if k != "step"]
        held += [getattr(optimizer, name, None) for name in ("state_groups", "optim_state")]
        impl = getattr(optimizer, "impl", optimizer)
        if isinstance(impl, GradientTransformation):  # pure functions, which deepcopy breaks
            memo[id(impl)] = impl
    # deepcopy refuses tensors in a graph: a MetaOptimizer's parameters, torchopt's states.
    memo |= {id(t): _twin(t) for t in tree_leaves(cast(Any, held)) if isinstance(t, Tensor)}
    given = {
        "discriminator": loss.discriminator,
        "optimizer": optimizers if isinstance(loss.optimizer, list) else optimizers[0],
        "objective": loss.objective,
        "project": loss.project,
        "transform_gradients": loss.transform_gradients,
    }
    copied = UnrolledGeneratorLoss(
        **{name: _copied(name, part, memo) for name, part in given.items()},
        unroll_steps=loss.unroll_steps,
        stop_gradient=loss.stop_gradient,
        average=loss.average,
        checkpoint=loss.checkpoint,
        sync=False,  # the copies are this rank's alone
    )
    copied._moving = copy.copy(loss._moving)
    return copied


@contextmanager
def standing_in(twin: nn.Module, module: nn.Module) -> Iterator[None]:
    """Let a module have the tensors of its copy: an objective or a hook may close over it."""
    with preserved(module):
        for own, copied in zip(module.modules(), twin.modules(), strict=True):
            vars(own).update(_parameters=copied._parameters, _buffers=copied._buffers)
        yield


def _twin(tensor: Tensor) -> Tensor:
    """Return a copy in float64, a parameter's with its hooks and attributes."""
    twin: Tensor = double(tensor)
    if isinstance(tensor, nn.Parameter) or tensor.grad_fn is not None:
        twin = nn.Parameter(twin, tensor.requires_grad)
        twin._backward_hooks = tensor._backward_hooks
        vars(twin).update({k: double(v) for k, v in vars(tensor).items()})
    return twin


def _copied(name: str, part: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(part, memo)
    except Exception as error:
        raise TypeError(
            f"{name}: must be what copy.deepcopy can copy, for check_gradients to work on a copy; "
            f"it cannot ({type(error).__name__}: {error}). Keep locks, loggers and writers out of "
            "it, or give them a __deepcopy__."
        ) from error


def double(value: Any) -> Any:
    """Return a copy of a tensor, detached and in float64 if it is floating-point."""
    if isinstance(value, Tensor):
        value = value.detach().clone()
        return value.double() if value.is_floating_point() else value
    return value


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
        args, named = self._wide(args), self._wide(kwargs or {})
        if func == _DTYPE:
            found = func(*args)
            return self.dtype if found == torch.float64 else found
        if func in _CASTS:
            return args[0].double()
        return func(*args, **named)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dtype not in _WIDE:
                return value
            if value.grad_fn is not None:
                self.rounding.add(value.grad_fn.name())
            twin = (value, value.to(_WIDE[value.dtype]))
            return self.twins.setdefault(id(value), twin)[1]
        if isinstance(value, torch.dtype):
            return _WIDE.get(value, value)
        if type(value) in (tuple, list):
            return type(value)(map(self._wide, value))
        return {k: self._wide(v) for k, v in value.items()} if type(value) is dict else value
