"""What trains D, as a pure function of parameters, gradients and state (Eq. 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torchopt
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torchopt.base import GradientTransformation, UninitializedState
from torchopt.pytree import tree_leaves

from unroll._optimizers.group_rules import GROUP_RULES
from unroll._optimizers.grouped import Grouped
from unroll._optimizers.rules import RULES
from unroll._optimizers.several import Several
from unroll._optimizers.torch_optim import TorchOptim
from unroll._optimizers.torchopt_transformation import Transformation
from unroll._validation import warn

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
        """Return state and settings as inputs of compiled code.

        Numbers of the state and learning rates become tensors, which may change from step to step.
        """
        ...

    def export(self, state: Any) -> Any:
        """Return the state in the form in which the user's optimizer keeps it."""
        ...


_BUILT_IN = ", ".join(f"torch.optim.{cls.__name__}" for cls in (*RULES, *GROUP_RULES))
_OF_TORCHOPT: Any = (torchopt.Optimizer, torchopt.MetaOptimizer, torchopt.FuncOptimizer)
_TRANSPARENT = ("LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer")


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside Lightning's, Fabric's or Accelerate's wrapper.

    These leave its step alone. Others (Lookahead, SAM) take steps of their own and must not be
    looked through.
    """
    while any(cls.__name__ in _TRANSPARENT for cls in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def unwrapped_optimizers(given: Any) -> list[Any]:
    """Return the optimizers of a list without their wrappers, or the only one that is given."""
    return [unwrap_optimizer(one) for one in (given if isinstance(given, list) else [given])]


def _torch_optimizers(given: Any) -> list[Optimizer]:
    return [one for one in unwrapped_optimizers(given) if isinstance(one, Optimizer)]


def inner_optimizer(
    optimizer: Any, parameters: Tensors, optimizer_state: Any = None
) -> InnerOptimizer:
    """Return the look-ahead form of ``optimizer`` over D's named parameters.

    It is built from the live object at every call, so that schedules and loaded states count.
    """
    if isinstance(optimizer, list) and optimizer_state is None:
        everyone = unwrapped_optimizers(optimizer)
        if not everyone or any(isinstance(one, GradientTransformation) for one in everyone):
            raise ValueError(
                "optimizer: a list must hold optimizers with parameters of their own, at least "
                f"one; got {[type(one).__name__ for one in everyone]}. Put a bare transformation "
                "into torchopt.Optimizer(parameters, transformation)."
            )
        return Several([inner_optimizer(one, parameters) for one in everyone])
    optimizer = unwrap_optimizer(optimizer)
    bare = isinstance(optimizer, GradientTransformation)
    if optimizer_state is not None and not bare:
        raise ValueError(
            "optimizer_state: goes only with a bare torchopt transformation; "
            f"{type(optimizer).__name__} brings its own live state. Leave optimizer_state out."
        )
    if isinstance(optimizer, _OF_TORCHOPT):
        _check_own_step(optimizer)
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
        counts = Counter(id(p) for group in groups for p in group)
        if tied := [name for name, p in parameters.items() if counts[id(p)] > 1]:
            raise ValueError(
                f"optimizer: torchopt's MetaOptimizer makes two parameters of {tied[0]!r}, which "
                "layers of the discriminator share, at its first step; a look-ahead step does not. "
                "Use torchopt.Optimizer or a torch.optim optimizer."
            )
        inner = Transformation(optimizer.impl, parameters, groups, optimizer.state_groups)
    elif isinstance(optimizer, Optimizer):
        inner = _of_torch(optimizer, parameters)
    else:
        raise TypeError(
            "optimizer: must be a torch.optim optimizer or torchopt's Optimizer, MetaOptimizer, "
            "FuncOptimizer or GradientTransformation, or a list of optimizers; got "
            f"{type(optimizer).__name__}. Pass the optimizer that trains the discriminator."
        )
    given = getattr(optimizer, "param_groups", ())
    groups = [group["params"] if isinstance(group, dict) else group for group in given]
    counts = Counter(id(p) for group in groups for p in group)
    if repeated := [name for name, p in parameters.items() if counts[id(p)] > 1]:
        raise ValueError(
            f"optimizer: must hold every parameter once; it has {repeated[0]!r} several times and "
            "moves it as often in a step, which a look-ahead step does not. Pass the parameters "
            "of layers that share some as discriminator.parameters(), which has each once."
        )
    if not inner.names:
        raise ValueError(
            "optimizer: must hold parameters of the discriminator; it holds none of them. Pass the "
            "optimizer that was built on discriminator.parameters()."
        )
    return inner


def _check_own_step(optimizer: Any) -> None:
    """Refuse subclasses of torchopt's optimizers that take another step."""
    for base in _OF_TORCHOPT:
        if isinstance(optimizer, base) and type(optimizer).step is not base.step:
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} overrides the step of torchopt's "
                f"{base.__name__}, which the look-ahead would not follow. Put what it does into "
                "its transformation, or into transform_gradients= or project=."
            )


def _of_torch(optimizer: Optimizer, parameters: Tensors) -> InnerOptimizer:
    """Return the form of an optimizer whose class, or the base that its step is of, is known."""
    kind = type(optimizer)
    for base in (base for base in kind.__mro__ if base in GROUP_RULES or base in RULES):
        if _own_parts(kind) == _own_parts(base):
            if base in GROUP_RULES:
                return Grouped(optimizer, parameters, GROUP_RULES[base])
            return TorchOptim(optimizer, parameters, RULES[base])
    raise TypeError(
        f"optimizer: no differentiable form of {kind.__module__}.{kind.__name__} is known. Use one "
        f"of {_BUILT_IN}, a torchopt transformation, or teach the library its update by "
        f"unroll.register_rule({kind.__name__}, rule)."
    )


def _own_parts(cls: Any) -> tuple[Any, Any]:
    """Return what makes a step, without the profiler's hook, which torch adds to a class."""
    step = cls.step.__wrapped__ if getattr(cls.step, "hooked", False) else cls.step
    return step, getattr(cls, "_init_group", None)


class Moving:
    """The parameters that take steps: those that the optimizer holds and that are not frozen.

    A loop may freeze all of D for its G step: then those move that did before, as far as the
    optimizer has a state of them if it has any. What the look-ahead leaves out, as far as it can be
    seen, is warned of; each kind once.
    """

    def __init__(self) -> None:
        self.held: frozenset[str] = frozenset()
        self.free: dict[str, bool] = {}  # which of those held were, the last time that any was
        self.said: set[str] = set()

    def among(self, given: Any, parameters: Tensors, names: frozenset[str]) -> frozenset[str]:
        """Return the names of those that move, where the optimizer ``given`` holds ``names``."""
        for kind, text in _left_out(given, parameters, names):
            self._warn(kind, text)
        self.held = frozenset(name for name in names if parameters[name].is_floating_point())
        self.see(parameters)
        free = frozenset(name for name in self.held if self.free.get(name, True))
        if any(parameters[name].requires_grad for name in free):
            return free
        states = [one.state for one in _torch_optimizers(given)]
        stepped = frozenset(n for n in free if any(parameters[n] in state for state in states))
        return stepped or free

    def see(self, parameters: Tensors) -> None:
        """Remember which of those held are frozen now, unless all of them are."""
        free = {name: parameters[name].requires_grad for name in self.held & parameters.keys()}
        if any(free.values()):
            if changed := [n for n, now in free.items() if self.free.get(n, now) is not now]:
                self._warn(
                    "freezing",
                    f"discriminator: {listed(changed)} were frozen or unfrozen since the last "
                    "look-ahead, which now follows: those that require a gradient move. Freeze "
                    "all of D for G's step, or nothing, where that is not meant.",
                )
            self.free = free

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            warn(text)


def _left_out(
    given: Any, parameters: Mapping[str, Tensor], names: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """Yield kinds of what a loop does besides the optimizer's step, and texts that say so."""
    unheld = [n for n, p in parameters.items() if p.requires_grad and n not in names]
    if unheld:
        yield (
            "unheld",
            f"optimizer: holds no {listed(unheld)} of the discriminator, which require a gradient "
            "and stand still in the look-ahead. If another optimizer trains them, pass a list of "
            "both; if none does, freeze them by requires_grad_(False).",
        )
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters.values()):
        yield (
            "post-accumulate",
            "discriminator: parameters have post-accumulate-grad hooks, which do not run in the "
            "look-ahead. If one changes gradients, use parameter.register_hook.",
        )
    advice = (
        "not run in the look-ahead. If that changes gradients or parameters, do it in project= or "
        "in a torchopt transformation."
    )
    of_torch = _torch_optimizers(given)
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if any(getattr(one, name, None) for one in of_torch for name in hooks):
        yield "hooks", f"optimizer: has step hooks, which do {advice}"
    everywhere = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    if of_torch and any(everywhere):
        yield "global hooks", f"optimizer: torch has global step hooks, which do {advice}"
    stepped = [one for one in unwrapped_optimizers(given) if hasattr(one, "param_groups")]
    if any(map(_replaced, stepped)):
        yield "step", f"optimizer: its step was replaced by a function, which does {advice}"


def _replaced(optimizer: Any) -> bool:
    """Return whether a function is in the place of an optimizer's step."""
    step: Any = vars(optimizer).get("step")
    while getattr(step, "_wrapped_by_lr_sched", False):  # a scheduler, which counts the steps
        step = step.__wrapped__
    step = getattr(step, "_torchdynamo_orig_callable", step)  # torch.compile
    return step is not None and getattr(step, "__func__", step) is not type(optimizer).step


def listed(names: Any) -> str:
    """Return some of the names, for a message."""
    shown = sorted(names)
    return ", ".join(map(repr, shown[:5])) + f" and {len(shown) - 5} more" * (len(shown) > 5)
