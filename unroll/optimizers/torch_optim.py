"""``torch.optim``'s optimizers, as they stand, in a form that can be differentiated.

A rule maps a parameter ``p``, its gradient ``g``, the optimizer's state ``s`` for it and its param
group's hyper-parameters ``h`` to the new parameter and state, without changing any of them. Rules
work element by element, so they run on flat vectors of many parameters. Step counts are Python
floats, so that bias corrections have double precision, as in the plain optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from unroll.derivatives import safe_sqrt

Tensors = Mapping[str, Tensor]
State = dict[str, Any]
Rule = Callable[[Tensor, Tensor, State, Mapping[str, Any]], tuple[Tensor, State]]


def adam(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> tuple[Tensor, State]:
    """Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) and AMSGrad."""
    (beta1, beta2), lr, weight_decay = h["betas"], h["lr"], h["weight_decay"]
    step = s.get("step", 0.0) + 1.0
    g = -g if h["maximize"] else g
    if weight_decay and h["decoupled_weight_decay"]:
        p = p * (1 - lr * weight_decay)
    elif weight_decay:
        g = g + weight_decay * p
    m = beta1 * s["exp_avg"] + (1 - beta1) * g if s else (1 - beta1) * g
    v = beta2 * s["exp_avg_sq"] + (1 - beta2) * g * g if s else (1 - beta2) * g * g
    state = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    if h["amsgrad"]:
        v = torch.maximum(s["max_exp_avg_sq"], v) if s else v
        state["max_exp_avg_sq"] = v
    denominator = safe_sqrt(v) / (1 - beta2**step) ** 0.5 + h["eps"]
    return p - lr / (1 - beta1**step) * m / denominator, state


def sgd(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> tuple[Tensor, State]:
    """Stochastic gradient descent with momentum, dampening, Nesterov's form and weight decay."""
    momentum, state = h["momentum"], s
    g = -g if h["maximize"] else g
    if h["weight_decay"]:
        g = g + h["weight_decay"] * p
    if momentum:
        last = s.get("momentum_buffer")
        buffer = g if last is None else momentum * last + (1 - h["dampening"]) * g
        state = {"momentum_buffer": buffer}
        g = g + momentum * buffer if h["nesterov"] else buffer
    return p - h["lr"] * g, state


RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.SGD: sgd,
}


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


class TorchOptim:
    """A ``torch.optim`` optimizer: its rule, its live param groups and its live state."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Tensors) -> None:
        names = {id(p): name for name, p in parameters.items()}
        self._rule, self._parameters = _rule(optimizer), parameters
        self._buckets: list[_Bucket] = []
        for group in optimizer.param_groups:
            hyper = {
                key: value.detach().clone() if isinstance(value, Tensor) else value
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
        """Return the live state, apart from what the user holds."""
        return self._buckets

    def step(
        self, parameters: Tensors, gradients: Tensors, state: list[_Bucket]
    ) -> tuple[dict[str, Tensor], list[_Bucket]]:
        """Return theta_D^{k+1} and the next state."""
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
        """Return the state as the user's optimizer keeps it."""
        return {k: v for bucket in state for k, v in bucket.per_name(self._parameters).items()}


def _live(key: str, value: Any) -> Any:
    """Return a state entry apart from the user's; step counts become Python floats."""
    if not isinstance(value, Tensor):
        return value
    return float(value) if key == "step" else value.detach().clone()
