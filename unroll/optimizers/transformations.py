"""Torchopt's transformations, by their own ``init`` and ``update``, never in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation, UninitializedState
from torchopt.pytree import tree_flatten, tree_map, tree_unflatten

from unroll.derivatives import differentiable_roots

Tensors = Mapping[str, Tensor]


class Transformation:
    """A torchopt transformation: its own ``init`` and ``update``, never in place."""

    traceable = False  # trees of tensors that torch.compile does not know

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
        functions = list(_functions(impl.update))
        _refuse_inexact(functions)
        self._states = [self._started(g, s) for g, s in zip(self._groups, states, strict=True)]
        self._adagrad = any(f.__module__ == "torchopt.transform.scale_by_rss" for f in functions)
        self._masked = any(f.__qualname__.startswith("_masked.") for f in functions)
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
                "optimizer, optimizer_state: must be what the transformation's init returned for "
                "tuple(discriminator.parameters()), or an update of it; its structure or its "
                "shapes differ. Initialise it with transformation.init(tuple(D.parameters())), or "
                "step the FuncOptimizer with tuple(D.parameters())."
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
        """Return the live state, apart from what the user holds."""
        return [tree_flatten(s, none_is_leaf=True) for s in self._states], self._cell_values

    def step(
        self, parameters: Tensors, gradients: Tensors, state: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Return theta_D^{k+1} and the next state."""
        states, cell_values = state
        moved, new_states = dict(parameters), []
        live = [cell.cell_contents for _, cell in self._cells]
        try:
            _fill(self._cells, cell_values)
            for group, (leaves, structure) in zip(self._groups, states, strict=True):
                old = tree_unflatten(structure, leaves)
                theta = tuple(p if name is None else parameters[name] for name, p in group)
                grads = tuple(None if name is None else gradients.get(name) for name, _ in group)
                without = [n for (n, _), g in zip(group, grads, strict=True) if g is None]
                if without and self._masked:
                    raise ValueError(
                        "optimizer: torchopt's masked cannot take a step, here or in training, "
                        f"where parameters have no gradient; {without} have none. Give the "
                        "optimizer the other parameters alone, or take the mask out."
                    )
                with differentiable_roots(adagrad=self._adagrad):
                    updates, new = self._impl.update(grads, old, params=theta, inplace=False)
                if without:  # momentum forgets the trace of a skipped parameter
                    new = tree_map(lambda n, o: o if n is None else n, new, old, none_is_leaf=True)
                theta = torchopt.apply_updates(theta, updates, inplace=False)
                moved |= {name: p for (name, _), p in zip(group, theta, strict=True) if name}
                new_states.append(tree_flatten(new, none_is_leaf=True))
            new_values = [cell.cell_contents for _, cell in self._cells]
        finally:
            _fill(self._cells, live)
        return moved, (new_states, new_values)

    def as_inputs(self, state: Any) -> Any:
        """Return the state: it consists of tensors."""
        return state

    def export(self, state: Any) -> Any:
        """Return the state as the user's optimizer keeps it."""
        states = [tree_unflatten(structure, leaves) for leaves, structure in state[0]]
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
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, partial):
            stack.extend((item.func, item.args, item.keywords))
        elif isinstance(item, MethodType):
            stack.extend((item.__func__, vars(item.__self__)))
        elif isinstance(item, FunctionType):
            yield item
            stack.extend(cell.cell_contents for _, cell in _cells(item))


def _cells(function: FunctionType) -> list[tuple[str, CellType]]:
    """Return the variables that a function closes over and that have a value."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [(name, cell) for name, cell in cells if cell != CellType()]


def _python_state(functions: Iterable[FunctionType]) -> list[tuple[str, CellType]]:
    """Return the closure cells in which a transformation may keep flags and counters."""
    return [
        (name, cell)
        for function in functions
        for name, cell in _cells(function)
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
        if function.__module__ == "torchopt.hook":
            raise ValueError(
                "optimizer: torchopt.register_hook changes gradients on their way back, so what "
                "reached the generator would not be the gradient of its loss. Leave it out: a zero "
                "second moment gives no NaN here."
            )
        if function.__qualname__.startswith("_masked.") and any(
            getattr(cell.cell_contents, "__name__", None) == "tree_map_flat"
            for _, cell in _cells(function)
        ):
            raise ValueError(
                "optimizer: torchopt's flat masks (adamw(mask=...), masked.flat) fail in "
                "torchopt's own step too. Build it as torchopt.chain(scale_by_adam(), masked("
                "add_decayed_weights(0.01), mask), scale(-lr)), all of torchopt.transform."
            )
