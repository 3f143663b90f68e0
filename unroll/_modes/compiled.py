"""The look-ahead as compiled code: one step and its adjoint, the same for every k."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, takewhile
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor

from unroll._autograd_fixes import stance
from unroll._functional import Pair, map_tensors, preserved, tensors
from unroll._look_ahead import Game, LookAhead, Point, Step, differentiate, leaves, update
from unroll._modes.adjoint import filled
from unroll._modes.backend import cause, compiled_step
from unroll._modes.comparison import compare
from unroll._modes.traced import floats_of, traced_step
from unroll._modes.trajectory import Entered, form, trajectory
from unroll._penalties import summands
from unroll._random import every_random_state, replayed, set_every_random_state
from unroll._validation import same, warn

_codes = count()
_NOTHING = torch.empty(0)
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Code:
    """What one loss has compiled; it makes a look-ahead fast, or leaves it as it is.

    Whatever is compiled is compared with the eager step first, derivatives included.
    """

    def __init__(self) -> None:
        # A code object of its own: torch counts recompilations by code object; and a name of its
        # own: torch finds out by name which shapes and numbers vary.
        code = traced_step.__code__.replace(co_name=f"traced_step_{next(_codes)}")
        self.code = code
        function = FunctionType(code, traced_step.__globals__)
        self.function = torch.compile(function, backend=self._compile, fullgraph=True)
        self.entered: Entered | None = None  # the code that has just run
        self.compared = True  # whether all code that there is has been
        self.serves = False  # whether any code does
        self.given_up = False
        self.whole = True  # whether the update is compiled, too, and not D's gradients alone
        self.lengths = True  # whether the length of a batch becomes an input where it varies
        # Parameters with a gradient, by the forms of D and of the state; none: it is fresh.
        self.reached: dict[Any, tuple[str, ...]] = {}

    def __reduce__(self) -> Any:
        """Leave compiled code out of copies and pickles: it belongs to its game."""
        return Code, ()

    def _compile(self, graph: Any, inputs: Sequence[Any]) -> Any:
        """Compile what Dynamo has captured, as a backend of ``torch.compile``."""
        self.compared = False
        code = compiled_step(graph, inputs)

        def run(*given: Any) -> Sequence[Any]:
            with torch.no_grad():
                found = code.forward(list(given))
            self.entered = Entered(code, given, found)
            return found[: len(code.differentiable)]

        return run

    def look_ahead(self, step: Step, game: Game) -> LookAhead:
        """Return the look-ahead as compiled code; the eager one, after a warning, if that fails."""
        if game.mean is not None:
            self.give_up("its gradients are averaged over ranks (sync)")
        if any(p._backward_hooks for p in game.discriminator.parameters.values()):
            self.give_up("a parameter of D has gradient hooks")
        if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
            self.give_up("there are hooks of all modules")

        def ahead(
            point: Point, pairs: Sequence[Pair], settings: Any, *, every: bool = False
        ) -> tuple[list[Point], list[Tensor]]:
            call = _Call(self, step, game, settings, every)
            points, losses = [point], list[Tensor]()
            while rest := pairs[len(losses) :]:
                found, lost = call.steps(points[-1], rest)
                points = [*points, *found] if every else found
                losses += lost
            return points[1:] if every and losses else points, losses

        return ahead

    def retreat(self, error: Exception, game: Game) -> None:
        """Ask less of the compiler from now on, which has failed, or give up."""
        if self.serves and self.lengths:
            self.lengths = False  # such as dropout, in torch.func: every length anew
        elif self.whole and (game.transform_gradients or game.project):
            self.whole = False  # the user's functions run as they are
        else:
            self.give_up(cause(error, self.code))

    def give_up(self, reason: str) -> None:
        """Stay eager from now on, and say why, once."""
        if not self.given_up:
            self.given_up = True
            warn(
                f"compile: the look-ahead runs uncompiled, with the same result: {reason}. Set "
                "compile=False, which does the same without this warning."
            )


class _Call(NamedTuple):
    """One look-ahead, in steps that are compiled or eager."""

    code: Code
    step: Step
    game: Game
    settings: Any
    every: bool  # whether every point is wanted, or the last one

    def steps(self, point: Point, pairs: Sequence[Pair]) -> tuple[list[Point], list[Tensor]]:
        """Take one step or more on the first of the pairs; return what :func:`look_ahead` does."""
        code, game, failure = self.code, self.game, None
        state, settings = game.optimizer.as_inputs(point.optimizer_state, self.settings)
        start = point._replace(optimizer_state=state)
        if reached := self._reached(start, pairs[0], settings):
            device = next(iter(point.parameters.values())).device
            before = every_random_state(device)
            try:
                with _quiet():
                    found = self._compiled(reached, start, pairs, settings)
                    if not code.compared:

                        def single(*given: Any) -> Point:
                            return self._compiled(reached, given[0], [given[1]], given[2])[0][0]

                        given = _alike(game, start, pairs[0], settings)
                        compare(single, self.step, given, before[0], device)
                code.compared = code.serves = True
                return found
            except Exception as error:  # a backend may raise anything; the eager step goes on
                failure = error
                set_every_random_state(before, device)
        # An error of the user's passes through here.
        following = self.step(point, pairs[0], self.settings)
        if failure is not None:
            code.retreat(failure, game)
        return [following], [following.loss]

    def _compiled(
        self, reached: tuple[str, ...], point: Point, pairs: Sequence[Pair], settings: Any
    ) -> tuple[list[Point], list[Tensor]]:
        """Take the steps that one piece of code serves, the first one at least."""
        code, game = self.code, self.game
        whole = code.whole and game.optimizer.traceable
        bare = point if whole else point._replace(optimizer_state=None)
        inputs = settings if whole else None
        start, pair, used = _alike(game, bare, pairs[0], inputs)
        carried = start[:3]
        # Hooks that D gets later are part of it, too.
        options = {"skip_nnmodule_hook_guards": False, "automatic_dynamic_shapes": code.lengths}
        with stance("default"), torch._dynamo.config.patch(options):
            floats = floats_of(game.objective)
            result, loss = code.function(game, whole, floats, reached, carried, used, pair)
        entered, code.entered = code.entered, None
        if entered is None:
            raise RuntimeError("torch.compile is switched off")
        chained = whole and form(result) == form(carried)
        found, losses = trajectory(
            entered,
            tensors((carried, used, pair)),
            tensors((bare[:3], inputs, pairs[0])),
            [*tensors(result), loss],
            [tensors(pair) for pair in (_of_one_form(pairs) if chained else pairs[:1])],
            chained=chained,
            every=self.every,
        )
        points = []
        for values, loss in zip(found, losses[-len(found) :], strict=True):
            parameters, buffers, state = filled(result, values)
            if not whole:
                before = point.parameters, parameters, point.optimizer_state
                parameters, state = update(game, *before, settings)
            points.append(Point(parameters, buffers, state, loss))
        return points, losses

    def _reached(self, point: Point, pair: Pair, settings: Any) -> tuple[str, ...]:
        """Return the parameters that D's loss depends on; none where the step is to be eager.

        That is a fresh optimizer's first step, which is not worth compiling, and where code cannot
        serve.
        """
        game, before, known = self.game, point.optimizer_state, self.code.reached
        structure = form(before) if game.optimizer.traceable else None
        batch = form(map_tensors(lambda _: _NOTHING, pair))  # D may use others for another form
        key = game.discriminator.layers, game.moving, structure, batch
        if key in known or self.code.given_up:
            return () if self.code.given_up else known[key]
        if any(t.layout != torch.strided for t in tensors((point, pair))):
            self.code.give_up("a tensor in the batch or a buffer of D is sparse")
            return ()
        module, device = game.discriminator.module, next(iter(point.parameters.values())).device
        random_state = every_random_state(device)
        also = [*summands(game.objective), game.transform_gradients, game.project]
        theta = leaves(point.parameters, game.moving)
        found = []
        with preserved(module, also):
            for _ in range(2):
                with replayed(random_state[0], device):
                    loss, gradients, buffers = differentiate(
                        game, theta, point.buffers, pair, create_graph=False
                    )
                    moved, after = update(game, theta, gradients, before, settings)
                parts = [p for p in (*module.modules(), *also) if hasattr(p, "__dict__")]
                kept: Any = None
                with suppress(RecursionError):  # of a dict that holds itself
                    kept = form([vars(part) for part in parts])
                found.append((kept, tensors((loss, moved, after, buffers))))
        set_every_random_state(random_state, device)
        (attributes, values), (attributes_then, values_then) = found
        close = same if device.type == "cpu" else partial(torch.allclose, equal_nan=True)
        if attributes != attributes_then or not all(map(close, values, values_then)):
            self.code.give_up(
                "D, the objective or another function of yours keeps state in attributes, or draws "
                "from Python's or NumPy's generator, which compiled code would not see (register "
                "buffers, draw from torch's)"
            )
        if buffers.keys() != point.buffers.keys():
            self.code.give_up("D makes or drops a buffer as it runs")
        known[key] = tuple(gradients) if _size(before) == _size(after) else ()
        return () if self.code.given_up else known[key]


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


def _alike(game: Game, point: Point, pair: Pair, settings: Any) -> tuple[Point, Pair, Any]:
    """Return what a step starts from, so that one piece of compiled code serves all k."""
    graph = torch.is_grad_enabled()

    def same(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(graph and tensor.requires_grad)

    def flat(tensor: Tensor) -> Tensor:  # of the state; its numbers are constants
        return tensor.detach().requires_grad_(graph and tensor.dim() == 1)

    theta = {
        name: p.detach().requires_grad_(graph and name in game.moving)
        for name, p in point.parameters.items()
    }
    state = map_tensors(flat if game.optimizer.traceable else same, point.optimizer_state)
    buffers, pair, settings = map_tensors(same, (point.buffers, pair, settings))
    return Point(theta, buffers, state, point.loss), pair, settings


def _of_one_form(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs up to the first that the code of the first one does not serve."""

    def form_of(pair: Pair) -> Hashable:
        """Return the form, and which tensors are the same ones or require a gradient."""
        found = tensors(pair)
        numbers = {id(t): i for i, t in enumerate(found)}
        return form(pair), *((numbers[id(t)], t.requires_grad) for t in found)

    first, wanted = pairs[0], form_of(pairs[0])
    return [*takewhile(lambda pair: pair is first or form_of(pair) == wanted, pairs)]


def _size(state: Any) -> int:
    """Return the number of elements in the flat vectors of a state."""
    return sum(t.numel() for t in tensors(state) if t.dim() == 1)
