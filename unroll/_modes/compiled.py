"""A look-ahead step and its adjoint as compiled code, the same for every k."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from unroll._autograd_fixes import right_derivatives
from unroll._functional import FunctionalDiscriminator, Pair, map_tensors
from unroll._look_ahead import Game, Point, Step, differentiate, leaves
from unroll._modes.backend import inductor
from unroll._modes.comparison import Given, compare
from unroll._objectives import Objective
from unroll._optimizers import InnerOptimizer
from unroll._random import random_state, replayed, set_random_state
from unroll._validation import mapped

_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Traceable:
    """``module`` as a pure function, in a form that ``torch.compile`` can trace."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self,
        function: Callable[[FunctionalDiscriminator], Any],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return ``function(D)`` with these tensors in D, and the buffers that it leaves behind."""
        left = {**buffers}

        def forward(*args: Any, **kwargs: Any) -> Any:
            left.update({name: buffer.clone() for name, buffer in left.items()})
            return functional_call(self.module, ({**parameters}, left), args, kwargs)

        with right_derivatives():
            return function(FunctionalDiscriminator(forward)), left


@dataclass(frozen=True)
class Played:
    """What compiled code is made of, besides tensors."""

    module: nn.Module
    optimizer: InnerOptimizer
    objective: Objective


def _traced(
    played: Played,
    reached: tuple[str, ...],
    theta: dict[str, Tensor],
    buffers: dict[str, Tensor],
    state: Any,
    settings: Any,
    pair: Pair,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Tensor]:
    """Return theta_D^{k+1} (Eq. 7), D's buffers, the optimizer's state and D's loss.

    Where the optimizer cannot be traced, the gradients are in place of theta_D^{k+1}.
    """

    def loss(moving: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        objective = played.objective
        return Traceable(played.module)(
            lambda d: objective.discriminator_loss(d, *pair), {**theta, **moving}, buffers
        )

    differentiated = grad_and_value(loss, has_aux=True)
    found, (value, left) = differentiated({name: theta[name] for name in reached})
    if played.optimizer.traceable:
        with torch.autocast(value.device.type, enabled=False):
            moved, state = played.optimizer.step(theta, found, state, settings)
        found = {name: moved[name] for name in reached}
    return found, left, state, value.detach()


class Code:
    """What one loss has compiled; it makes a step fast, or leaves it as it is.

    Whatever is compiled is compared with the eager step first, derivatives included.
    """

    def __init__(self) -> None:
        # A code object of its own: torch counts recompilations by code object.
        function = FunctionType(_traced.__code__.replace(), _traced.__globals__)
        # Shapes are constants: torch would take those of another loss for a reason to vary them.
        self._function = torch.compile(
            function, backend=self._compile, fullgraph=True, dynamic=False
        )
        self._compared = True  # whether all code that there is has been
        self._given_up = False
        self._reached: dict[Any, tuple[str, ...]] = {}  # parameters with a gradient, by D's form

    def __deepcopy__(self, memo: object) -> Code:
        """Return one that has compiled nothing: code belongs to its game."""
        return Code()

    def __reduce__(self) -> Any:
        """Leave compiled code out of a pickle."""
        return Code, ()

    def _compile(self, graph: Any, inputs: Sequence[Any]) -> Any:
        self._compared = False
        torch._functorch.config.donated_buffer = False  # it refuses backward(retain_graph=True)
        return inductor(graph, inputs)

    def step(self, step: Step, game: Game) -> Step:
        """Return the step as compiled code; itself, after one warning, where that fails."""
        if game.mean is not None or game.transform_gradients is not None:
            self._give_up("its gradients are changed by sync= or transform_gradients=")
        if any(p._backward_hooks for p in game.discriminator.parameters.values()):
            self._give_up("a parameter of D has gradient hooks")
        if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
            self._give_up("there are hooks of all modules")

        form = game.discriminator.layers, game.moving

        def compiled(point: Point, pair: Pair, settings: Any) -> Point:
            state, settings = game.optimizer.as_inputs(point.optimizer_state, settings)
            point = point._replace(optimizer_state=state)
            first = form not in self._reached
            if first:
                self._reached[form] = self._prepare(game, point, pair)
            # A fresh optimizer's first step has another structure, not worth compiling.
            if first or self._given_up:
                return step(point, pair, settings)
            given: Given = (point, pair, settings)
            given = _alike(game, given)
            device = next(iter(point.parameters.values())).device
            before = random_state(device)
            run = partial(self._run, game, self._reached[form])
            try:
                with _quiet():
                    following = run(*given)
                    if not self._compared:
                        compare(run, step, given, before, device)
                self._compared = True
            except Exception as error:  # a backend may raise anything; the eager step goes on
                set_random_state(before, device)
                self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                return step(point, pair, settings)
            return following

        return compiled

    def _run(
        self, game: Game, reached: tuple[str, ...], point: Point, pair: Pair, settings: Any
    ) -> Point:
        traceable = game.optimizer.traceable
        state = point.optimizer_state
        played = Played(game.discriminator.module, game.optimizer, game.objective)
        with (
            torch.compiler.set_stance("default"),
            # Hooks that D gets later are part of it, too.
            torch._dynamo.config.patch(skip_nnmodule_hook_guards=False),
        ):
            found, buffers, traced, loss = self._function(
                played,
                reached,
                dict(point.parameters),
                dict(point.buffers),
                state if traceable else None,
                settings if traceable else None,
                pair,
            )
        with torch.autocast(loss.device.type, enabled=False):
            if traceable:
                state = traced
            else:
                found, state = game.optimizer.step(point.parameters, found, state, settings)
            moved = {**point.parameters, **found}
            if game.project is not None:
                moved = mapped("project", game.project, moved)
        return Point(moved, buffers, state, loss)

    def _prepare(self, game: Game, point: Point, pair: Pair) -> tuple[str, ...]:
        """Return the parameters that D's loss depends on; give up where code cannot serve."""
        device = next(iter(point.parameters.values())).device
        with replayed(random_state(device), device):
            theta = leaves(point.parameters, game.moving)
            _, gradients, buffers = differentiate(
                game, theta, point.buffers, pair, create_graph=False
            )
        if buffers.keys() != point.buffers.keys():
            self._give_up("D makes or drops a buffer as it runs")
        return tuple(gradients)

    def _give_up(self, reason: str) -> None:
        """Stay eager from now on, and say why, once."""
        if not self._given_up:
            self._given_up = True
            warnings.warn(
                f"compile: the look-ahead runs uncompiled, with the same result: {reason}. Set "
                "compile=False, or change what is named.",
                stacklevel=2,
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore what torch warns of when it compiles, which the user may have made an error.

    ``warnings.catch_warnings`` would make Python forget which warnings it has shown once.
    """
    filters, ignore = cast("list[Any]", warnings.filters), ("ignore", None, Warning, None, 0)
    filters.insert(0, ignore)
    try:
        yield
    finally:
        filters.remove(ignore)


def _alike(game: Game, given: Given) -> Given:
    """Return what a step starts from, so that one piece of compiled code serves all k."""
    if not torch.is_grad_enabled():
        constants: Given = map_tensors(Tensor.detach, given)
        return constants
    point, pair, settings = given
    theta = leaves(point.parameters, game.moving)
    state = point.optimizer_state
    if game.optimizer.traceable:  # flat vectors, and numbers, which are constants
        state = map_tensors(lambda t: _leaf(t) if t.dim() == 1 else t.detach(), state)
    return point._replace(parameters=theta, optimizer_state=state), pair, settings


def _leaf(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()
