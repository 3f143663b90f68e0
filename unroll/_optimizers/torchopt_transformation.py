"""Torchopt's transformations, by their own ``init`` and ``update``, never in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dis import get_instructions
from functools import cache, partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation, UninitializedState
from torchopt.pytree import tree_flatten, tree_map, tree_unflatten

from unroll._autograd_fixes import differentiable_roots

Tensors = Mapping[str, Tensor]
FIRST_CALL = "first_call"  # the one variable of a closure in which torchopt itself keeps state


class Transformation:
    """A torchopt transformation over D's named parameters.

    Its state is ``(trees, first_calls)``: the state of each param group, flattened, and whether
    each of its momenta has yet to be called, which torchopt keeps in a closure.
    """

    traceable = False  # trees of tensors that torch.compile does not know
    settings = ()  # they are in the transformation's closures

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
        everything = [p for group in groups for p in group]
        self.others: Sequence[Tensor] = [p for p in everything if id(p) not in names]
        self._impl, self._single = impl, single
        self._groups = [[(names.get(id(p)), p.detach()) for p in group] for group in groups]
        functions = list(_functions(impl.update))
        _refuse(functions)
        self._states = [self._started(g, s) for g, s in zip(self._groups, states, strict=True)]
        self._adagrad = any(f.__module__ == "torchopt.transform.scale_by_rss" for f in functions)
        self._masked = any(f.__qualname__.startswith("_masked.") for f in functions)
        cells = [cell for f in functions for name, cell in _cells(f) if name == FIRST_CALL]
        self._cells = list({id(cell): cell for cell in cells}.values())
        self._first_calls = [cell.cell_contents for cell in self._cells]

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
        kept = [e if g is None else _cloned(g) for g, e in zip(given, expected, strict=True)]
        return tree_unflatten(structure, kept)

    def start_afresh(self) -> None:
        """Take the first call of every momentum for one that is to come."""
        self._first_calls = [True] * len(self._cells)

    @property
    def initial_state(self) -> Any:
        """Return a copy of the live state."""
        return [tree_flatten(s, none_is_leaf=True) for s in self._states], self._first_calls

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        state: Any,
        settings: Any,
    ) -> tuple[dict[str, Tensor], Any]:
        """Return theta_D^{k+1} and the next state."""
        trees, first_calls = state
        moved, new_trees = dict(parameters), []
        live = self._swap(first_calls)
        try:
            for group, (leaves, structure) in zip(self._groups, trees, strict=True):
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
                new_trees.append(tree_flatten(new, none_is_leaf=True))
        finally:
            first_calls = self._swap(live)
        return moved, (new_trees, first_calls)

    def _swap(self, first_calls: Sequence[bool]) -> list[bool]:
        """Put other values into the closures of momenta, and return those that were there."""
        before = [cell.cell_contents for cell in self._cells]
        for cell, value in zip(self._cells, first_calls, strict=True):
            cell.cell_contents = value
        return before

    def as_inputs(self, state: Any, settings: Any) -> tuple[Any, Any]:
        """Return both as they are: they consist of tensors."""
        return state, settings

    def export(self, state: Any) -> Any:
        """Return the state as the user's optimizer keeps it."""
        states = [tree_unflatten(structure, leaves) for leaves, structure in state[0]]
        return states[0] if self._single else tuple(states)


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _shape(leaf: Any) -> Any:
    return leaf.shape if isinstance(leaf, Tensor) else type(leaf)


def _functions(update: Any) -> Iterator[FunctionType]:
    """Yield the functions that a transformation consists of, methods' included."""
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
            stack.extend((item.__func__, getattr(item.__self__, "__dict__", {})))
        elif isinstance(item, FunctionType):
            yield item
            stack.extend(cell.cell_contents for _, cell in _cells(item))


def _cells(function: FunctionType) -> list[tuple[str, CellType]]:
    """Return the variables that a function closes over and that have a value."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [(name, cell) for name, cell in cells if cell != CellType()]


@cache
def _hidden_state(code: CodeType) -> str | None:
    """Return a variable of a closure or an attribute that a function assigns, if there is one."""
    closures = set(code.co_freevars) - {FIRST_CALL}
    stored = [(i.opname, str(i.argval)) for i in get_instructions(code)]
    found = (n for op, n in stored if op == "STORE_ATTR" or (op == "STORE_DEREF" and n in closures))
    return next(found, None)


def _refuse(functions: Iterable[FunctionType]) -> None:
    """Refuse derivatives that would be wrong, and state that a look-ahead would advance."""
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
    for function in functions:
        if (variable := _hidden_state(function.__code__)) is not None:
            raise ValueError(
                f"optimizer: {function.__qualname__} keeps state in {variable!r}, outside the "
                "state that its init returns, so a look-ahead would advance the real one. Put it "
                "into the transformation's state, as a tensor."
            )
