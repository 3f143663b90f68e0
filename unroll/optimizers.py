"""What trains D, as a pure function of parameters, gradients and state (Eq. 7)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import CellType, FunctionType
from typing import Any, Protocol

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation, UninitializedState
from torchopt.pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from unroll.derivatives import differentiable_roots
from unroll.rules import RULES, Rule

Tensors = Mapping[str, Tensor]


class InnerOptimizer(Protocol):
    """The optimizer of D as it stands at one call."""

    names: frozenset[str]  # of D's parameters that it trains

    def initial_state(self) -> Any:
        """Return the state to start from, apart from everything that the user holds."""
        ...

    def step(
        self, parameters: Tensors, gradients: Tensors, state: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Return theta_D^{k+1} and the next state; parameters without a gradient are skipped."""
        ...

    def export(self, state: Any) -> Any:
        """Return the state in the form in which the user's optimizer keeps it."""
        ...


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside Lightning's or Accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
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
        inner = _TorchOpt(optimizer, parameters, [everything], [state], single=True)
        if optimizer_state is None:
            inner.forget()
    elif isinstance(optimizer, torchopt.FuncOptimizer):
        inner = _TorchOpt(
            optimizer.impl, parameters, [everything], [optimizer.optim_state], single=True
        )
    elif isinstance(optimizer, torchopt.Optimizer):
        inner = _TorchOpt(
            optimizer.impl, parameters, optimizer.param_groups, optimizer.state_groups
        )
    elif isinstance(optimizer, torchopt.MetaOptimizer):
        containers: Any = optimizer.param_containers_groups
        groups = [tuple(tree_leaves(container)) for container in containers]
        inner = _TorchOpt(optimizer.impl, parameters, groups, optimizer.state_groups)
    elif isinstance(optimizer, torch.optim.Optimizer):
        inner = _TorchOptim(optimizer, _rule(optimizer), parameters)
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


class _TorchOpt:
    """A torchopt transformation: its own ``init`` and ``update``, never in place."""

    def __init__(
        self,
        impl: GradientTransformation,
        parameters: Tensors,
        groups: Sequence[Sequence[Tensor]],
        states: Sequence[Any],
        *,
        single: bool = False,
    ) -> None:
        names = {id(p): name for name, p in parameters.items()}
        self.names = frozenset(names[id(p)] for group in groups for p in group if id(p) in names)
        self._impl, self._single = impl, single
        self._groups = [[(names.get(id(p)), p.detach()) for p in group] for group in groups]
        self._states = [self._started(g, s) for g, s in zip(self._groups, states, strict=True)]
        functions = list(_functions(impl.update))
        _refuse_inexact(functions)
        self._adagrad = any(f.__module__ == "torchopt.transform.scale_by_rss" for f in functions)
        self._cells = _python_state(functions)
        self._cell_values = [cell.cell_contents for _, cell in self._cells]

    def _started(self, group: list[tuple[str | None, Tensor]], state: Any) -> Any:
        fresh = self._impl.init(tuple(p for _, p in group))
        if isinstance(state, UninitializedState):
            return fresh
        expected, structure = tree_flatten(fresh, none_is_leaf=True)
        given, given_structure = tree_flatten(state, none_is_leaf=True)
        if structure != given_structure or any(
            g is not None and _shape(g) != _shape(e) for g, e in zip(given, expected, strict=True)
        ):
            raise ValueError(
                "optimizer_state: must be what the transformation's init returned for "
                "tuple(discriminator.parameters()), or an update of it; its structure or its "
                "shapes differ. Initialise it with transformation.init(tuple(D.parameters()))."
            )
        # torchopt's momentum drops the trace of a parameter that got no gradient.
        kept = [e if g is None else _apart(g) for g, e in zip(given, expected, strict=True)]
        return tree_unflatten(structure, kept)

    def forget(self) -> None:
        """Start torchopt's momentum afresh: it keeps its first call in a closure, not its state."""
        for i, (name, _) in enumerate(self._cells):
            if name == "first_call":
                self._cell_values[i] = True

    def initial_state(self) -> Any:
        return self._states, self._cell_values

    def step(
        self, parameters: Tensors, gradients: Tensors, state: Any
    ) -> tuple[dict[str, Tensor], Any]:
        states, cell_values = state
        moved, new_states = dict(parameters), []
        live = [cell.cell_contents for _, cell in self._cells]
        try:
            _fill(self._cells, cell_values)
            for group, old in zip(self._groups, states, strict=True):
                theta = tuple(p if name is None else parameters[name] for name, p in group)
                grads = tuple(None if name is None else gradients.get(name) for name, _ in group)
                with differentiable_roots(adagrad=self._adagrad):
                    updates, new = self._impl.update(grads, old, params=theta, inplace=False)
                if None in grads:  # momentum forgets the trace of a skipped parameter
                    new = tree_map(lambda n, o: o if n is None else n, new, old, none_is_leaf=True)
                theta = torchopt.apply_updates(theta, updates, inplace=False)
                moved |= {name: p for (name, _), p in zip(group, theta, strict=True) if name}
                new_states.append(new)
            new_values = [cell.cell_contents for _, cell in self._cells]
        finally:
            _fill(self._cells, live)
        return moved, (new_states, new_values)

    def export(self, state: Any) -> Any:
        states, _ = state
        return states[0] if self._single else tuple(states)


def _apart(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _shape(leaf: Any) -> Any:
    return leaf.shape if isinstance(leaf, Tensor) else type(leaf)


def _fill(cells: Sequence[tuple[str, CellType]], values: Sequence[Any]) -> None:
    for (_, cell), value in zip(cells, values, strict=True):
        cell.cell_contents = value


def _functions(update: Any) -> Iterator[FunctionType]:
    """Yield the functions that a transformation consists of: its own and those it closes over."""
    stack, seen = [update], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (tuple, list)):
            stack.extend(item)
        elif isinstance(item, FunctionType):
            yield item
            stack.extend(cell.cell_contents for cell in item.__closure__ or ())


def _python_state(functions: Iterable[FunctionType]) -> list[tuple[str, CellType]]:
    """Return the closure cells in which a transformation may keep flags and counters."""
    return [
        (name, cell)
        for function in functions
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        )
        if cell.cell_contents is None or isinstance(cell.cell_contents, (bool, int, float))
    ]


def _refuse_inexact(functions: Iterable[FunctionType]) -> None:
    for function in functions:
        if function.__module__ == "torchopt.clip":
            raise ValueError(
                "optimizer: torchopt.clip_grad_norm detaches the norm it divides by, so the "
                "gradient through it would be wrong. Clip inside a transformation of your own "
                "that keeps the norm in the graph, or leave the clipping out of the look-ahead."
            )
        if "accelerated" in function.__qualname__:
            raise ValueError(
                "optimizer: torchopt's use_accelerated_op=True has an inexact derivative (off by "
                "4e-6). Build the optimizer with use_accelerated_op=False."
            )


def _rule(optimizer: torch.optim.Optimizer) -> Rule:
    """Return the update equation of an optimizer, or refuse it by name."""
    for base in type(optimizer).__mro__:
        if base in RULES and type(optimizer).step is base.step:
            return RULES[base]
    known = ", ".join(f"torch.optim.{cls.__name__}" for cls in RULES)
    raise TypeError(
        f"optimizer: no differentiable form of {type(optimizer).__module__}."
        f"{type(optimizer).__name__} is known. Use one of {known}, or a torchopt transformation."
    )


@dataclass(frozen=True)
class _Bucket:
    """Parameters that take the same step, as one flat vector: a few large operations are fast."""

    names: tuple[str, ...]
    hyper: Mapping[str, Any]
    state: Mapping[str, Any]  # flat tensors, and plain numbers that they share

    def split(self, keep: Mapping[str, Any], like: Tensors) -> Iterator[_Bucket]:
        """Yield the part whose names are in ``keep``, and the rest, if there are both."""
        if len({name in keep for name in self.names}) == 1:
            yield self
            return
        per_name = self.per_name(like)
        for _, part in groupby(sorted(self.names, key=keep.__contains__), keep.__contains__):
            names = tuple(part)
            yield _Bucket(names, self.hyper, _join([per_name[name] for name in names]))

    def per_name(self, like: Tensors) -> dict[str, dict[str, Any]]:
        """Return the state of each parameter, in its shape."""
        shaped = [like[name] for name in self.names]
        columns = {
            key: _unflatten(value, shaped) if isinstance(value, Tensor) else [value] * len(shaped)
            for key, value in self.state.items()
        }
        return {
            name: {key: column[i] for key, column in columns.items()}
            for i, name in enumerate(self.names)
        }


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


def _join(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        key: _flatten([s[key] for s in states]) if isinstance(value, Tensor) else value
        for key, value in states[0].items()
    }


class _TorchOptim:
    """A ``torch.optim`` optimizer: its rule, its live param groups and its live state."""

    def __init__(self, optimizer: torch.optim.Optimizer, rule: Rule, parameters: Tensors) -> None:
        names = {id(p): name for name, p in parameters.items()}
        self._rule, self._parameters = rule, parameters
        self._buckets: list[_Bucket] = []
        for group in optimizer.param_groups:
            hyper = {
                key: value.detach() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key != "params"
            }
            alike: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
            for p in group["params"]:
                if id(p) in names:
                    state = {k: _live(k, v) for k, v in optimizer.state.get(p, {}).items()}
                    numbers = [(k, v) for k, v in state.items() if not isinstance(v, Tensor)]
                    key = (p.dtype, p.device, tuple(state), tuple(numbers))
                    alike.setdefault(key, []).append((names[id(p)], state))
            for members in alike.values():
                bucket_names, states = zip(*members, strict=True)
                self._buckets.append(_Bucket(bucket_names, hyper, _join(states)))
        self.names = frozenset(name for bucket in self._buckets for name in bucket.names)

    def initial_state(self) -> list[_Bucket]:
        return self._buckets

    def step(
        self, parameters: Tensors, gradients: Tensors, state: list[_Bucket]
    ) -> tuple[dict[str, Tensor], list[_Bucket]]:
        moved, new_state = dict(parameters), []
        buckets = [part for bucket in state for part in bucket.split(gradients, parameters)]
        for bucket in buckets:
            if bucket.names[0] in gradients:
                theta = [parameters[name] for name in bucket.names]
                gradient = _flatten([gradients[name] for name in bucket.names])
                flat, s = self._rule(_flatten(theta), gradient, dict(bucket.state), bucket.hyper)
                moved |= zip(bucket.names, _unflatten(flat, theta), strict=True)
                bucket = _Bucket(bucket.names, bucket.hyper, s)
            new_state.append(bucket)
        return moved, new_state

    def export(self, state: list[_Bucket]) -> dict[str, dict[str, Any]]:
        return {k: v for bucket in state for k, v in bucket.per_name(self._parameters).items()}


def _live(key: str, value: Any) -> Any:
    """Return a state entry apart from the user's; step counts become Python floats."""
    if not isinstance(value, Tensor):
        return value
    return float(value) if key == "step" else value.detach().clone()
