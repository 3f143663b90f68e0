"""Optimizers whose update is a rule over the parameters of one param group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from unroll._autograd_fixes import differentiable_roots
from unroll._functional import map_tensors, tensors
from unroll._optimizers.group_rules import GROUP_RULES, GroupRule

Tensors = Mapping[str, Tensor]


def register_rule(optimizer_class: type[Optimizer], rule: GroupRule) -> None:
    """Teach the library the update of an optimizer, from whose live state it then looks ahead.

    Args:
        optimizer_class: The class that trains D, and its subclasses that override neither ``step``
            nor ``_init_group``. A class that is known already gets the new rule.
        rule: ``rule(parameters, gradients, states, group)`` returns ``(new_parameters, new_states,
            new_group)``, for one param group at a time: lists of the parameters that have a
            gradient (maybe none), of their gradients and of their states, as ``optimizer.state[p]``
            holds them (``{}`` before the first step), and the param group without ``"params"``. It
            is differentiated through, so it computes with tensors, out of place: no ``.item()``,
            no ``torch.no_grad()``. Entries of a state or a group are tensors and plain values.

    Raises:
        TypeError: ``optimizer_class`` is no subclass of ``torch.optim.Optimizer``, or ``rule`` is
            not callable. What else is wrong with a rule is refused when it is used.

    Example:
        >>> import torch, unroll
        >>> class SignSGD(torch.optim.Optimizer):
        ...     def __init__(self, params, lr):
        ...         super().__init__(params, {"lr": lr})
        ...     @torch.no_grad()
        ...     def step(self):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 p.sub_(group["lr"] * p.grad.sign())
        >>> def sign_sgd(parameters, gradients, states, group):
        ...     moved = [p - group["lr"] * g.sign() for p, g in zip(parameters, gradients)]
        ...     return moved, states, group
        >>> unroll.register_rule(SignSGD, sign_sgd)
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(
            "optimizer_class: must be a subclass of torch.optim.Optimizer; got "
            f"{optimizer_class!r}. Pass the class itself, such as type(d_optimizer)."
        )
    if not callable(rule):
        raise TypeError(
            "rule: must be a function (parameters, gradients, states, group) -> (new_parameters, "
            f"new_states, new_group); got {rule!r}. Pass the function itself."
        )
    GROUP_RULES[optimizer_class] = rule


class Grouped:
    """An optimizer of torch as it stands, by a rule that is run on each of its param groups.

    Its state is a list of (names, states, param group): numbers of a group may change in a step.
    """

    traceable = False  # users' rules may be anything
    settings = ()  # they are in the param groups

    def __init__(self, optimizer: Optimizer, parameters: Tensors, rule: GroupRule) -> None:
        names = {id(p): name for name, p in parameters.items()}
        self._rule, self._name = rule, type(optimizer).__name__
        others: list[Tensor] = []
        self.initial_state: list[Any] = []
        for group in optimizer.param_groups:
            own = [p for p in group["params"] if id(p) in names]
            others += [p for p in group["params"] if id(p) not in names]
            states = [map_tensors(_constant, dict(optimizer.state.get(p, {}))) for p in own]
            settings = map_tensors(_setting, {k: v for k, v in group.items() if k != "params"})
            self.initial_state.append((tuple(names[id(p)] for p in own), states, settings))
        self.others: Sequence[Tensor] = others
        self.names = frozenset(name for own, *_ in self.initial_state for name in own)

    def step(
        self, parameters: Tensors, gradients: Tensors, state: Any, settings: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Return theta_D^{k+1} and the next state."""
        moved, new_state = dict(parameters), []
        for names, states, group in state:
            reached = [i for i, name in enumerate(names) if name in gradients]
            theta = {names[i]: parameters[names[i]] for i in reached}
            found = [gradients[name] for name in theta]
            new, changed, group = self._updated(theta, found, [states[i] for i in reached], group)
            moved |= zip(theta, new, strict=True)
            following = dict(enumerate(states)) | dict(zip(reached, changed, strict=True))
            new_state.append((names, list(following.values()), group))
        return moved, new_state

    def _updated(
        self, theta: Tensors, gradients: list[Tensor], states: list[Any], group: Any
    ) -> tuple[Sequence[Tensor], Sequence[Any], Any]:
        """Return what the rule makes of a group, or refuse it."""
        given = (list(theta.values()), gradients, states, group)
        versions = [t._version for t in tensors(given)]
        in_place = (
            "not write in place into what it is given; it did. Write p = p - ... in place of "
            "p.sub_(...), for entries of states and of the group, too."
        )
        try:
            with differentiable_roots(adagrad=False):
                found: Any = self._rule(*map_tensors(lambda t: t, given))  # in fresh containers
        except RuntimeError as error:
            if "in-place operation" not in str(error):  # torch refuses it of a leaf, by itself
                raise
            raise self._refusal(in_place) from error
        if [t._version for t in tensors(given)] != versions:
            raise self._refusal(in_place)
        parts = [found, *found] if isinstance(found, tuple) else [found]
        wanted: Any = (tuple, (list, tuple), (list, tuple), Mapping)
        if len(parts) != 4 or not all(isinstance(p, w) for p, w in zip(parts, wanted, strict=True)):
            raise self._refusal(
                "return (new_parameters, new_states, new_group); got "
                f"{', '.join(type(part).__name__ for part in parts)}. Return a list, a list and a "
                "dict in one tuple."
            )
        new, changed, new_group = found
        if not len(new) == len(changed) == len(theta):
            raise self._refusal(
                f"return a parameter and a state for each of the {len(theta)} parameters that it "
                f"was given; got {len(new)} and {len(changed)}. Keep their order."
            )
        for (name, p), moved, g in zip(theta.items(), new, gradients, strict=True):
            if _form(moved) != _form(p):
                raise self._refusal(
                    f"keep the shape and type of parameters; {name!r} came as {_form(p)} and left "
                    f"as {_form(moved)}. Reduce or convert only what is put into the states."
                )
            in_graph = torch.is_grad_enabled() and (p.requires_grad or g.requires_grad)
            if in_graph and not moved.requires_grad:
                raise self._refusal(
                    f"be differentiable; {name!r} left without a graph. Compute it from parameters "
                    "and gradients by plain operations, without torch.no_grad(), .data or detach()."
                )
        lost = sorted(map(str, group.keys() - new_group.keys()))
        if lost or not all(isinstance(state, Mapping) for state in changed):
            raise self._refusal(
                "return states and the group as dicts, the group with all of its entries; got "
                f"states of {sorted({type(state).__name__ for state in changed})} and a group "
                f"without {lost}. Return {{**group, 'd': d}} where d is all that changes."
            )
        return found  # type: ignore[no-any-return]

    def _refusal(self, text: str) -> ValueError:
        return ValueError(f"rule of {self._name}: must {text}")

    def as_inputs(self, state: Any, settings: Any) -> tuple[Any, Any]:
        """Return both as they are: no compiled code gets them."""
        return state, settings

    def export(self, state: Any) -> dict[str, dict[str, Any]]:
        """Return the state as the user's optimizer keeps it, by the names of parameters."""
        pairs = [zip(names, states, strict=True) for names, states, _ in state]
        return {name: dict(own) for pair in pairs for name, own in pair}


def _form(tensor: Any) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else repr(tensor)


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _setting(tensor: Tensor) -> Tensor:
    """Return a copy of a hyper-parameter; itself, if it is differentiated."""
    return tensor if tensor.requires_grad else _constant(tensor)
