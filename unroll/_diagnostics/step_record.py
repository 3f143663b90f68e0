"""Steps on record: of the user's loop and of the look-ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.pytree import tree_leaves

from unroll._functional import Pair, preserved
from unroll._look_ahead import (
    Game,
    Gradients,
    Point,
    inner_step,
    look_ahead,
    one_step,
    without_graph,
)
from unroll._loss import UnrolledGeneratorLoss

TOLERANCE = 1e-4  # relative, beyond round-off
Numbers = dict[Any, Tensor]  # in float64


class Update(NamedTuple):
    """What a step consists of."""

    gradients: Numbers
    moves: Numbers  # of D's parameters
    state: Numbers  # of the optimizer, by what it is and of which parameter


def taken(loss: UnrolledGeneratorLoss, game: Game, point: Point, pair: Pair, h: Any) -> Update:
    """Take one step of the look-ahead, with its gradients on record."""
    found: Gradients = {}
    transform = game.transform_gradients or (lambda gradients: gradients)

    def record(gradients: Gradients) -> Mapping[str, Tensor]:
        transformed = transform(gradients)
        found.update(transformed)
        return transformed

    recording = replace(game, transform_gradients=record)
    with preserved(*loss._parts):
        step = one_step(without_graph(partial(look_ahead, inner_step(recording))))
        end = step(point, pair, h)
    state = entries(game.optimizer.export(end.optimizer_state))
    return Update(double(found), minus(double(end.parameters), double(point.parameters)), state)


def entries(states: Any) -> Numbers:
    """Return the numbers in an optimizer's state."""
    if isinstance(states, Mapping):
        found = {(k, name): v for name, entry in states.items() for k, v in entry.items()}
    else:
        found = {(str(i), ""): v for i, v in enumerate(tree_leaves(states))}
    return double({k: torch.as_tensor(v) for k, v in found.items() if v is not None})


def double(tensors: Mapping[Any, Tensor]) -> Numbers:
    """Return copies in float64."""
    return {name: t.detach().cpu().double().clone() for name, t in tensors.items()}


def minus(one: Numbers, other: Numbers) -> Numbers:
    """Return the differences."""
    return {name: value - other[name] for name, value in one.items()}


def norm(tensors: Numbers) -> float:
    """Return the norm of all of them."""
    return float(sum(float(t.norm()) ** 2 for t in tensors.values()) ** 0.5)


@dataclass
class Call:
    """One call of the user's ``step`` beside a step of the look-ahead from the same point."""

    loss: UnrolledGeneratorLoss
    game: Game
    point: Point
    pair: Pair
    random: Any  # state of the generators
    updates: tuple[Update, Update, Update]  # the loop's, ours, ours off by round-off
    settings: list[Any]  # of the param groups, at each step of the real optimizer
    early: list[str]  # parameters that had changed when the first of these began
    left: Numbers  # D's .grads before the call
    strangers: list[str]  # tensors outside D that moved
    drew: bool  # random numbers

    def __post_init__(self) -> None:
        """Compare the gradients, the state and the movement."""
        held, start = self.game.optimizer.names, double(self.point.parameters)
        empty = {n: torch.zeros_like(p) for n, p in start.items() if n in held}
        self.real, self.ours, nudged = ({**empty, **u.gradients} for u in self.updates)
        kinds = {p.dtype for p in self.point.parameters.values() if p.is_floating_point()}
        eps, self.size = max(torch.finfo(kind).eps for kind in kinds), norm(self.ours)
        self.floor = 10 * eps * self.size
        self.noise = 10 * norm(minus(self.ours, nudged))
        self.off = _differing((self.real, self.ours, nudged), dict.fromkeys(empty, self.floor))
        self.error = _relative(self.real, self.ours)
        # Adam makes a whole step of a gradient that is round-off.
        told = {
            n: (g.abs() > 10 * (nudged[n] - g).abs().amax() + self.floor)
            | ((g == 0) & (self.real[n] == 0))
            for n, g in self.ours.items()
            if g.numel()
        }

        def kept(name: str, value: Tensor) -> Tensor:
            alike = name in told and told[name].shape == value.shape
            return (torch.where(told[name], value, 0.0) if alike else value).flatten()

        self.moves = [{n: kept(n, v) for n, v in u.moves.items()} for u in self.updates]
        floors = {n: 4 * eps * float(p.norm()) for n, p in start.items()}
        self.moved = _differing(self.moves, floors)
        common = self.updates[0].state.keys() & self.updates[1].state.keys()
        states = [{k: kept(k[1], u.state[k]) for k in common} for u in self.updates]
        self.state = _differing(states, dict.fromkeys(common, 0.0))
        if not self.off:
            self.error = max(self.error, _relative(*self.moves[:2]))
        self.telling = self.noise <= 0.1 * self.size > 0
        single = len(self.settings) == 1
        self.wrong = bool(self.off or self.strangers or (single and (self.moved or self.state)))


def _differing(steps: Sequence[Numbers], floors: Any) -> list[Any]:
    """Return what differs by more than round-off in the loop's, our and our nudged step."""
    real, ours, nudged = steps
    gap, noise = minus(ours, real), minus(ours, nudged)
    allowed = {n: TOLERANCE * v.norm() + 10 * noise[n].norm() + floors[n] for n, v in ours.items()}
    return [n for n in ours if not bool(gap[n].norm() <= allowed[n])]


def _relative(real: Numbers, ours: Numbers) -> float:
    gap, size = norm(minus(ours, real)), norm(ours)
    return gap / size if size else float(gap > 0)
