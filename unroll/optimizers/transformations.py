"""Torchopt's transformations, by their own ``init`` and ``update``, never in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation, UninitializedState
from torchopt.pytree import tree_flatten, tree_map, tree_unflatten

from unroll.derivatives import differentiable_roots
from unroll.stateless import map_tensors

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
        functions = [part for part in _parts(impl.update) if isinstance(part, FunctionType)]
        _refuse_inexact(functions)
        self._states = [self._started(g, s) for g, s in zip(self._groups, states, strict=True)]
        self._adagrad = any(f.__module__ == "torchopt.transform.scale_by_rss" for f in functions)
        self._masked = any(f.__qualname__.startswith("_masked.") for f in functions)
        self._slots = _python_state(impl.update)
        self._slot_values = [_copied(slot.read()) for slot in self._slots]

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
        for i, slot in enumerate(self._slots):
            if slot.name == "first_call":
                self._slot_values[i] = True

    def initial_state(self) -> Any:
        """Return the live state, apart from what the user holds."""
        return [tree_flatten(s, none_is_leaf=True) for s in self._states], self._slot_values

    def step(
        self, parameters: Tensors, gradients: Tensors, state: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Return theta_D^{k+1} and the next state."""
        states, values = state
        moved, new_states = dict(parameters), []
        live = [slot.read() for slot in self._slots]
        try:
            for slot, value in zip(self._slots, values, strict=True):
                slot.write(_copied(value))
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
            new_values = [slot.read() for slot in self._slots]
        finally:
            for slot, value in zip(self._slots, live, strict=True):
                slot.write(value)
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


class _Slot(NamedTuple):
    """Where a transformation may keep state: a variable of a closure, an attribute of an object."""

    name: str
    place: CellType | dict[str, Any]

    def read(self) -> Any:
        return self.place[self.name] if isinstance(self.place, dict) else self.place.cell_contents

    def write(self, value: Any) -> None:
        if isinstance(self.place, dict):
            self.place[self.name] = value
        else:
            self.place.cell_contents = value


def _copied(value: Any) -> Any:
    """Return state apart from where it is kept; tensors keep their history."""
    return map_tensors(Tensor.clone, value)


def _parts(update: Any) -> Iterator[Any]:
    """Yield the functions and bound methods that a transformation consists of."""
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
            yield item
            stack.extend((item.__func__, getattr(item.__self__, "__dict__", {})))
        elif isinstance(item, FunctionType):
            yield item
            stack.extend(cell.cell_contents for _, cell in _cells(item))


def _cells(function: FunctionType) -> list[tuple[str, CellType]]:
    """Return the variables that a function closes over and that have a value."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [(name, cell) for name, cell in cells if cell != CellType()]


def _python_state(update: Any) -> list[_Slot]:
    """Return where a transformation may keep flags, counters and tensors besides its state."""
    slots = []
    for part in _parts(update):
        if isinstance(part, FunctionType):
            slots += [_Slot(name, cell) for name, cell in _cells(part)]
        else:
            attributes = getattr(part.__self__, "__dict__", {})
            slots += [_Slot(name, attributes) for name in attributes]
    once = {(id(slot.place), slot.name): slot for slot in slots}
    return [slot for slot in once.values() if _is_state(slot.read())]


def _is_state(value: Any) -> bool:
    """Return whether a value consists of numbers and tensors alone, or is not there yet."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(_is_state, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (bool, int, float, Tensor))


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
