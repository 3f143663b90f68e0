"""A look-ahead step and its adjoint as compiled code, the same for every k."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from unroll.game.objectives import Objective
from unroll.optimizers import InnerOptimizer
from unroll.stateless import Batch, map_tensors
from unroll.steps.backend import inductor
from unroll.steps.checks import Project, projected
from unroll.steps.comparison import Given, compare
from unroll.steps.discriminator import At, Point
from unroll.steps.randomness import random_state, set_random_state
from unroll.steps.recompute import Step

_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Functional:
    """``module`` as a pure function, in a form that ``torch.compile`` can trace."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return ``module(*args, **kwargs)`` and the buffers that it leaves behind."""
        left = {name: buffer.clone() for name, buffer in buffers.items()}
        output = functional_call(self.module, ({**parameters}, left), args, {**kwargs})
        return output, left


@dataclass(frozen=True)
class Game:
    """What a step consists of, besides tensors."""

    module: nn.Module
    optimizer: InnerOptimizer
    objective: Objective
    project: Project | None
    moving: frozenset[str]  # names of the parameters that take steps


def _traced(
    game: Game,
    reached: tuple[str, ...],
    theta: dict[str, Tensor],
    buffers: dict[str, Tensor],
    state: Any,
    fake: Batch,
    real: Batch,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Tensor]:
    """Return theta_D^{k+1} (Eq. 7), D's buffers, the optimizer's state and D's loss.

    Where the optimizer cannot be traced, the gradients are in place of theta_D^{k+1}.
    """

    def loss(moving: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        d = At(Functional(game.module), {**theta, **moving}, buffers, twice=True)
        return game.objective.discriminator_loss(d, fake, real), dict(d.buffers)

    differentiate = grad_and_value(loss, has_aux=True)
    found, (value, left) = differentiate({name: theta[name] for name in reached})
    if game.optimizer.traceable:
        with torch.autocast(value.device.type, enabled=False):
            moved, state = game.optimizer.step(theta, found, state)
        found = {name: moved[name] for name in reached}
    return found, left, state, value.detach()


class CompiledStep:
    """A step that is compiled at its first use; eager, with one warning, where that fails.

    Whatever is compiled is compared with the eager step first, derivatives included.
    """

    def __init__(self) -> None:
        # A code object of its own: torch counts recompilations by code object.
        function = FunctionType(_traced.__code__.replace(), _traced.__globals__)
        # Shapes are constants: torch would take those of another loss for a reason to vary them.
        self._function = torch.compile(
            function, backend=self._compile, fullgraph=True, dynamic=False
        )
        self._fresh = False  # whether there is new code, which has not been compared yet
        self._eager = False  # for good
        self.reached: tuple[str, ...] | None = None  # parameters with a gradient in eager steps

    def __deepcopy__(self, memo: object) -> CompiledStep:
        """Return one that has compiled nothing: code belongs to its game."""
        return CompiledStep()

    def __reduce__(self) -> Any:
        """Leave compiled code out of a pickle."""
        return CompiledStep, ()

    def _compile(self, graph: Any, inputs: Sequence[Any]) -> Any:
        self._fresh = True
        torch._functorch.config.donated_buffer = False  # it refuses backward(retain_graph=True)
        return inductor(graph, inputs)

    def __call__(
        self, step: Step[Point, Point], game: Game, given: Given, *, graph: bool, eager: bool
    ) -> Point:
        """Return what ``step(*given, graph=graph)`` does; by itself where ``eager``."""
        if any(p._backward_hooks for p in game.module.parameters()):
            self.fall_back("a parameter of D has gradient hooks")
        if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
            self.fall_back("there are hooks of all modules")
        point, fake, real = given
        inputs = game.optimizer.as_inputs(point.optimizer_state)
        given = (point._replace(optimizer_state=inputs), fake, real)
        if eager or self._eager or self.reached is None:
            following = step(*given, graph=graph)
            if following.buffers.keys() != point.buffers.keys():
                self.fall_back("D makes or drops a buffer as it runs")
            return following
        given = _alike(game, given, graph=graph)
        device = next(game.module.parameters()).device
        before = random_state(device)
        try:
            with _quiet():
                following = self._run(game, *given, graph=graph)
                if self._fresh:
                    compare(partial(self._run, game), step, given, before, device, graph=graph)
            self._fresh = False
        except Exception as error:  # whatever a backend raises: the eager step has the last word
            set_random_state(before, device)
            self.fall_back(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return step(*given, graph=graph)
        return following

    def _run(self, game: Game, point: Point, fake: Batch, real: Batch, *, graph: bool) -> Point:
        theta = dict(point.parameters)
        assert self.reached is not None
        with (
            torch.set_grad_enabled(graph),
            torch.compiler.set_stance("default"),
            # Hooks that D gets later are part of it, too.
            torch._dynamo.config.patch(skip_nnmodule_hook_guards=False),
        ):
            state = point.optimizer_state
            given = state if game.optimizer.traceable else None
            found, buffers, traced, loss = self._function(
                game, self.reached, theta, dict(point.buffers), given, fake, real
            )
        with torch.set_grad_enabled(graph), torch.autocast(loss.device.type, enabled=False):
            if game.optimizer.traceable:
                state = traced
            else:
                found, state = game.optimizer.step(theta, found, state)
            moved = {**theta, **found}
            if game.project is not None:
                moved = projected(game.project, moved, inspect=False)
        return Point(moved, buffers, state, loss)

    def fall_back(self, reason: str) -> None:
        """Stay eager from now on, and say why, once."""
        if not self._eager:
            self._eager = True
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


def _alike(game: Game, given: Given, *, graph: bool) -> Given:
    """Return what a step starts from, so that one piece of compiled code serves all k."""
    if not graph:
        constants: Given = map_tensors(Tensor.detach, given)
        return constants
    point, fake, real = given
    theta = {name: _leaf(p, name in game.moving) for name, p in point.parameters.items()}
    state = point.optimizer_state
    if game.optimizer.traceable:  # flat vectors, and numbers, which are constants
        state = map_tensors(lambda t: _leaf(t, True) if t.dim() == 1 else t.detach(), state)
    return point._replace(parameters=theta, optimizer_state=state), fake, real


def _leaf(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.detach().requires_grad_() if needed and not tensor.requires_grad else tensor
