"""Float64 copies of a loss, its D, its optimizer and its objective, for the self-check."""

from __future__ import annotations

import copy
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
import torchopt
from torch import Tensor, nn
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
    _in_double([module, objective, project, transform], set())
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


# What deepcopy does not copy, and optimizers, whose states are looked after apart.
_LEFT = (
    *(FunctionType, BuiltinFunctionType, ModuleType, type),
    *(torch.optim.Optimizer, torchopt.Optimizer, torchopt.FuncOptimizer, torchopt.MetaOptimizer),
)


def _copied(name: str, part: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(part, memo)
    except Exception as error:
        raise TypeError(
            f"{name}: must be what copy.deepcopy can copy, for check_gradients to work on a copy; "
            f"it cannot ({type(error).__name__}: {error}). Keep locks, loggers and writers out of "
            "it, or give them a __deepcopy__."
        ) from error


def _in_double(value: Any, seen: set[int]) -> Any:
    """Return what a copy holds in float64; objects and containers are changed in place."""
    if isinstance(value, Tensor):
        return double(value)
    if id(value) in seen or isinstance(value, _LEFT):
        return value
    seen.add(id(value))
    if isinstance(value, MethodType):
        _in_double(value.__self__, seen)
    elif isinstance(value, nn.Module):
        value.double()
        own = {k: v for k, v in vars(value).items() if k not in ("_parameters", "_buffers")}
        vars(value).update({k: _in_double(v, seen) for k, v in own.items()})
    elif isinstance(value, dict):
        value.update({k: _in_double(v, seen) for k, v in value.items()})
    elif isinstance(value, list):
        value[:] = [_in_double(v, seen) for v in value]
    elif isinstance(value, tuple):
        found = [_in_double(v, seen) for v in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    elif hasattr(value, "__dict__"):
        vars(value).update({k: _in_double(v, seen) for k, v in vars(value).items()})
    return value


def double(value: Any) -> Any:
    """Return a copy of a tensor, detached and in float64 if it is floating-point."""
    if isinstance(value, Tensor):
        value = value.detach().clone()
        return value.double() if value.is_floating_point() else value
    return value
