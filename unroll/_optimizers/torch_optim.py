"""``torch.optim``'s optimizers, as they stand, in a form that can be differentiated.

Parameters that take the same step are one flat vector, on which a rule (:mod:`rules`) runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unroll._functional import tensors
from unroll._optimizers.rules import BRANCHING, Rule

Tensors = Mapping[str, Tensor]
SCALARS = ("step", "mu_product", "eta", "mu")  # of the state: one number for all elements


class Bucket(NamedTuple):
    """Parameters that take the same step, as one flat vector: a few large operations are fast."""

    names: tuple[str, ...]
    group: int  # number of the param group whose settings they have
    scalar_dtype: torch.dtype  # in which torch keeps NAdam's product of momenta and ASGD's rates
    entries: Mapping[str, Any]  # of the state: flat vectors, and numbers that all elements share

    def split(self, keep: Collection[str], like: Tensors) -> Iterator[Bucket]:
        """Yield the part whose names are in ``keep``, and the rest, if there are both."""
        parts = [tuple(n for n in self.names if (n in keep) is kept) for kept in (False, True)]
        if not all(parts):
            yield self
            return
        per_name = self.per_name(like)
        for names in parts:
            yield self._replace(names=names, entries=_join([per_name[name] for name in names]))

    def per_name(self, like: Tensors) -> dict[str, dict[str, Any]]:
        """Return the state of each parameter, in its shape."""
        shaped = [like[name] for name in self.names]
        columns = {
            key: [_number(value)] * len(shaped) if key in SCALARS else _unflatten(value, shaped)
            for key, value in self.entries.items()
        }
        return {
            name: {key: column[i] for key, column in columns.items()}
            for i, name in enumerate(self.names)
        }


def _number(value: Any) -> Any:
    """Return a float; but a 0-d tensor, through which settings are differentiated, as it is."""
    return value if isinstance(value, Tensor) and not value.dim() else float(value)


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


def _join(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        key: value if key in SCALARS else _flatten([s[key] for s in states])
        for key, value in states[0].items()
    }


class TorchOptim:
    """A ``torch.optim`` optimizer: its rule, its live settings and its live state.

    Its state is a list of buckets; its settings are the hyper-parameters of each param group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Tensors, rule: Rule) -> None:
        names = {id(p): name for name, p in parameters.items()}
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        self.others: Sequence[Tensor] = [p for p in everything if id(p) not in names]
        self._rule, self._parameters = rule, parameters
        self.initial_state: list[Bucket] = []
        self.settings: list[dict[str, Any]] = []
        for number, group in enumerate(optimizer.param_groups):
            # Adagrad reads this one from its defaults, whatever a param group says.
            own = optimizer.defaults.keys() & {"initial_accumulator_value"}
            given = group | {key: optimizer.defaults[key] for key in own}
            self.settings.append({k: _setting(v) for k, v in given.items() if k != "params"})
            alike: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
            for p in group["params"]:
                if id(p) in names:
                    live = optimizer.state.get(p, {})
                    # Old versions of torch kept None; what else is no tensor, no rule knows.
                    kept = {k: v for k, v in live.items() if k in SCALARS or torch.is_tensor(v)}
                    state = {k: _live(k, v) for k, v in sorted(kept.items())}  # as after a step
                    numbers = tuple((k, v) for k, v in state.items() if not isinstance(v, Tensor))
                    key = (_scalar_dtype(live), p.dtype, p.device, tuple(state), numbers)
                    alike.setdefault(key, []).append((names[id(p)], state))
            for (scalar_dtype, *_), members in alike.items():
                bucket_names, states = zip(*members, strict=True)
                self.initial_state.append(Bucket(bucket_names, number, scalar_dtype, _join(states)))
        self.names = frozenset(name for bucket in self.initial_state for name in bucket.names)
        # Tensors among the settings round as in torch's own step, in eager code only.
        self.traceable = not tensors(self.settings) and self._rule not in BRANCHING

    def step(
        self, parameters: Tensors, gradients: Tensors, state: list[Bucket], settings: Any
    ) -> tuple[dict[str, Tensor], list[Bucket]]:
        """Return theta_D^{k+1} and the next state."""
        moved, new_state = dict(parameters), []
        buckets = [part for bucket in state for part in bucket.split(gradients, parameters)]
        for bucket in buckets:
            if bucket.names[0] in gradients:
                theta = [parameters[name] for name in bucket.names]
                gradient = _flatten([gradients[name] for name in bucket.names])
                entries = {k: _scalar(v) if k in SCALARS else v for k, v in bucket.entries.items()}
                h = {key: _scalar(value) for key, value in settings[bucket.group].items()}
                h["scalar_dtype"] = bucket.scalar_dtype
                flat, entries = self._rule(_flatten(theta), gradient, entries, h)
                flat = flat.to(gradient.dtype)  # state may be wider, of a D that was cast later
                moved.update(dict(zip(bucket.names, _unflatten(flat, theta), strict=True)))
                given = bucket.entries
                entries = {k: _like(entries[k], given.get(k)) for k in sorted(entries)}
                bucket = Bucket(bucket.names, bucket.group, bucket.scalar_dtype, entries)
            new_state.append(bucket)
        return moved, new_state

    def as_inputs(self, state: list[Bucket], settings: Any) -> tuple[list[Bucket], Any]:
        """Return state and settings, the numbers of a state and learning rates as tensors."""
        if not self.traceable:
            return state, settings
        buckets = [
            b._replace(entries={k: _matrix(v) if k in SCALARS else v for k, v in b.entries.items()})
            for b in state
        ]
        return buckets, [
            {k: _matrix(v) if k == "lr" else v for k, v in h.items()} for h in settings
        ]

    def export(self, state: list[Bucket]) -> dict[str, dict[str, Any]]:
        """Return the state as the user's optimizer keeps it."""
        return {k: v for bucket in state for k, v in bucket.per_name(self._parameters).items()}


def _setting(value: Any) -> Any:
    """Return a hyper-parameter, a copy unless it is differentiated; a tensor of one element as 0-d.

    The type of a 0-d tensor does not change that of the parameters that it multiplies.
    """
    if isinstance(value, tuple):
        return tuple(map(_setting, value))
    if not isinstance(value, Tensor):
        return value
    return (value if value.requires_grad else value.detach().clone()).squeeze()


def _scalar(value: Any) -> Any:
    """Return a number or a 0-d tensor, which does not change the type of what it multiplies."""
    if isinstance(value, tuple):
        return tuple(map(_scalar, value))
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value


def _like(value: Any, given: Any) -> Any:
    """Return an entry of the state in the type, and a number in the shape, in which it came."""
    if not isinstance(given, Tensor):
        return value
    return value.reshape(given.shape) if not value.dim() else value.to(given.dtype)


def _matrix(value: Any) -> Tensor:
    """Return a 1x1 tensor: torch.compile takes the value of a 0-d one for a constant at first."""
    given = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return given.reshape(1, 1)


def _live(key: str, value: Any) -> Any:
    """Return a copy of a state entry; a number that all elements share becomes a Python float."""
    if not isinstance(value, Tensor):
        return value
    return float(value) if key in SCALARS else value.detach().clone()


def _scalar_dtype(state: Mapping[str, Any]) -> torch.dtype:
    """Return the precision in which torch keeps NAdam's product of momenta and ASGD's rates."""
    for key in ("mu_product", "eta"):
        if isinstance(state.get(key), Tensor):
            dtype: torch.dtype = state[key].dtype
            return dtype
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
