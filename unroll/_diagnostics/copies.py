"""Float64 copies of a loss, its D, its optimizer and its objective, for the self-check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torchopt
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_leaves, tree_map

from unroll._functional import tensors
from unroll._loss import UnrolledGeneratorLoss
from unroll._optimizers import unwrapped_optimizers


def in_double(loss: UnrolledGeneratorLoss) -> UnrolledGeneratorLoss:
    """Return the loss on float64 copies of D, the optimizer with its state, and the objective."""
    optimizers = unwrapped_optimizers(loss.optimizer)
    memo: dict[int, Any] = {}
    # deepcopy refuses tensors in a graph: a MetaOptimizer's parameters, torchopt's states.
    for submodule in loss.discriminator.modules():
        for value in tensors(vars(submodule)):
            if value.grad_fn is not None:
                memo[id(value)] = nn.Parameter(value.detach().clone())
            elif value.layout != torch.strided:
                memo[id(value)] = value.clone()
    for optimizer in optimizers:
        states = [getattr(optimizer, name, None) for name in ("state_groups", "optim_state")]
        for value in tree_leaves(cast(Any, states)):
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
        impl = getattr(optimizer, "impl", optimizer)
        if isinstance(impl, GradientTransformation):  # pure functions, which deepcopy breaks
            memo[id(impl)] = impl
    module = _copied("discriminator", loss.discriminator, memo)
    optimizers = _copied("optimizer", optimizers, memo)
    objective = _copied("objective", loss.objective, memo)
    project = _copied("project", loss.project, memo)
    transform = _copied("transform_gradients", loss.transform_gradients, memo)
    module.double()
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            for state in optimizer.state.values():
                state.update({k: double(v) for k, v in state.items() if k != "step"})
        elif isinstance(optimizer, torchopt.FuncOptimizer):
            optimizer.optim_state = tree_map(double, cast(Any, optimizer.optim_state))
        elif isinstance(optimizer, (torchopt.Optimizer, torchopt.MetaOptimizer)):
            optimizer.state_groups = [tree_map(double, state) for state in optimizer.state_groups]
    copied = UnrolledGeneratorLoss(
        module,
        optimizers if isinstance(loss.optimizer, list) else optimizers[0],
        objective,
        unroll_steps=loss.unroll_steps,
        stop_gradient=loss.stop_gradient,
        average=loss.average,
        checkpoint=loss.checkpoint,
        transform_gradients=transform,
        project=project,
        sync=False,  # the copies are this rank's alone
    )
    copied._moving = copy.copy(loss._moving)
    originals = dict(loss.discriminator.named_parameters())
    for name, parameter in copied.discriminator.named_parameters():  # what deepcopy leaves out
        parameter._backward_hooks = originals[name]._backward_hooks
        vars(parameter).update({k: double(v) for k, v in vars(originals[name]).items()})
    return copied


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
