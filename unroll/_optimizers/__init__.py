"""What trains D, as a pure function of parameters, gradients and state (Eq. 7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation, UninitializedState
from torchopt.pytree import tree_leaves

from unroll._optimizers.torch_optim import TorchOptim
from unroll._optimizers.torchopt_transformation import Transformation

Tensors = Mapping[str, Tensor]


class InnerOptimizer(Protocol):
    """The optimizer of D as it stands at one call."""

    names: frozenset[str]  # of D's parameters that it trains
    others: Sequence[Tensor]  # tensors that it trains and that are no parameters of D
    settings: Any  # hyper-parameters as they stand, an input of its step
    traceable: bool  # whether torch.compile can trace its step

    @property
    def initial_state(self) -> Any:
        """A copy of the live state, to start from."""
        ...

    def step(
        self, parameters: Tensors, gradients: Tensors, state: Any, settings: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Return theta_D^{k+1} and the next state; parameters without a gradient are skipped."""
        ...

    def as_inputs(self, state: Any, settings: Any) -> tuple[Any, Any]:
        """Return state and settings with their numbers as tensors: inputs of compiled code."""
        ...

    def export(self, state: Any) -> Any:
        """Return the state in the form in which the user's optimizer keeps it."""
        ...


@dataclass
class Moving:
    """Which parameters take steps: those that the optimizer holds and that are not frozen.

    A loop may freeze all of D for its G step: then those move that did before.
    """

    frozen: frozenset[str] = frozenset()  # the last time that any was not

    def among(self, parameters: Tensors, held: Iterable[str]) -> frozenset[str]:
        """Return their names, at a call in which the optimizer holds these."""
        held = [name for name in held if parameters[name].is_floating_point()]
        frozen = frozenset(name for name in held if not parameters[name].requires_grad)
        if len(frozen) < len(held):
            self.frozen = frozen
        return frozenset(held) - self.frozen


_TRANSPARENT = ("LightningOptimizer", "AcceleratedOptimizer")


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside Lightning's or Accelerate's wrapper, which leave its step alone.

    Other wrappers (Lookahead, SAM) take steps of their own and must not be looked through.
    """
    while any(cls.__name__ in _TRANSPARENT for cls in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def inner_optimizer(
    optimizer: Any, parameters: Tensors, optimizer_state: Any = None
) -> InnerOptimizer:
    """Return the look-ahead form of ``optimizer`` over D's named parameters.

    It is built from the live object at every call, so that schedules and loaded states count.
    """
    optimizer = unwrap_optimizer(optimizer)
    bare = isinstance(optimizer, GradientTransformation)
    if optimizer_state is not None and not bare:
        raise ValueError(
            "optimizer_state: goes only with a bare torchopt transformation; "
            f"{type(optimizer).__name__} brings its own live state. Leave optimizer_state out."
        )
    everything = tuple(parameters.values())
    inner: InnerOptimizer
    if bare:
        state = UninitializedState() if optimizer_state is None else optimizer_state
        inner = Transformation(optimizer, parameters, [everything], [state], single=True)
        if optimizer_state is None:
            inner.start_afresh()
    elif isinstance(optimizer, torchopt.FuncOptimizer):
        inner = Transformation(
            optimizer.impl, parameters, [everything], [optimizer.optim_state], single=True
        )
    elif isinstance(optimizer, torchopt.Optimizer):
        inner = Transformation(
            optimizer.impl, parameters, optimizer.param_groups, optimizer.state_groups
        )
    elif isinstance(optimizer, torchopt.MetaOptimizer):
        containers: Any = optimizer.param_containers_groups
        groups = [tuple(tree_leaves(container)) for container in containers]
        inner = Transformation(optimizer.impl, parameters, groups, optimizer.state_groups)
    elif isinstance(optimizer, torch.optim.Optimizer):
        inner = TorchOptim(optimizer, parameters)
    else:
        raise TypeError(
            "optimizer: must be a torch.optim optimizer or torchopt's Optimizer, MetaOptimizer, "
            f"FuncOptimizer or GradientTransformation; got {type(optimizer).__name__}. Pass the "
            "optimizer that trains the discriminator."
        )
    if not inner.names:
        raise ValueError(
            "optimizer: must hold parameters of the discriminator; it holds none of them. Pass the "
            "optimizer that was built on discriminator.parameters()."
        )
    return inner
