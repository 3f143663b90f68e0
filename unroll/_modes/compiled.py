"""The look-ahead as compiled code: one step and its adjoint, the same for every k."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, groupby
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor

from unroll._autograd_fixes import stance
from unroll._functional import Pair, map_tensors, preserved, tensors
from unroll._look_ahead import Game, LookAhead, Point, Step, differentiate, leaves, update
from unroll._modes.backend import cause, compiled_step
from unroll._modes.checkpointed import filled
from unroll._modes.comparison import compare
from unroll._modes.traced import Carried, Played, numbers, traced_step
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
        self._code = code
        function = FunctionType(code, traced_step.__globals__)
        self._function = torch.compile(function, backend=self._compile, fullgraph=True)
        self._settings: dict[Any, Any] = {}  # as they were at the last call
        self._varying: set[str] = set()  # those that have changed, which are inputs from then on
        self._last: Any = None  # the code that has just run, what it got and what it found
        self._compared = True  # whether all code that there is has been
        self._given_up = False
        self._whole = True  # whether the update is compiled, too, and not D's gradients alone
        self._lengths = True  # whether the length of a batch becomes an input where it varies
        self._serves = False  # whether any code does
        # Parameters with a gradient, by the forms of D and of the state; none: it is fresh.
        self._reached: dict[Any, tuple[str, ...]] = {}

    def __deepcopy__(self, memo: object) -> Code:
        """Return one that has compiled nothing: code belongs to its game."""
        return Code()

    def __reduce__(self) -> Any:
        """Leave compiled code out of a pickle."""
        return Code, ()

    def _compile(self, graph: Any, inputs: Sequence[Any]) -> Any:
        """Compile what Dynamo has captured, as a backend of ``torch.compile``."""
        self._compared = False
        code = compiled_step(graph, inputs)

        def run(*given: Any) -> Sequence[Any]:
            with torch.no_grad():
                found = code.forward(list(given))
            self._last = Entered(code, given, found)
            return found[: len(code.differentiable)]

        return run

    def look_ahead(self, step: Step, game: Game) -> LookAhead:
        """Return the look-ahead as compiled code; the eager one, after a warning, if that fails."""
        if game.mean is not None:
            self._give_up("its gradients are averaged over ranks (sync)")
        if any(p._backward_hooks for p in game.discriminator.parameters.values()):
            self._give_up("a parameter of D has gradient hooks")
        if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
            self._give_up("there are hooks of all modules")

        def ahead(
            point: Point, pairs: Sequence[Pair], settings: Any, *, every: bool = False
        ) -> tuple[list[Point], list[Tensor]]:
            if game.optimizer.traceable:
                several = [part if isinstance(part, list) else [part] for part in settings]
                groups = enumerate(group for part in several for group in part)
                now = {(i, key): v for i, group in groups for key, v in group.items()}
                before, self._settings = self._settings, now
                self._varying |= {k[1] for k, v in now.items() if k in before and before[k] != v}
            points, losses = [point], list[Tensor]()
            forms = {n: _form(pair) for n, pair in {id(pair): pair for pair in pairs}.items()}
            for _, group in groupby(pairs, key=lambda pair: forms[id(pair)]):
                run = list(group)
                while run:
                    found, lost = self._some(step, game, points[-1], run, settings, every)
                    points = [*points, *found] if every else found
                    losses += lost
                    run = run[len(lost) :]
            return points[1:] if every and losses else points, losses

        return ahead

    def _some(
        self, step: Step, game: Game, point: Point, run: Sequence[Pair], settings: Any, every: bool
    ) -> tuple[list[Point], list[Tensor]]:
        """Take one step or more; return the last point, or every one, and D's losses."""
        state, inputs = game.optimizer.as_inputs(point.optimizer_state, settings, self._varying)
        start = point._replace(optimizer_state=state)
        structure = form(state) if game.optimizer.traceable else None
        batch = form(map_tensors(lambda _: _NOTHING, run[0]))  # D may use others for another form
        key = game.discriminator.layers, game.moving, structure, batch
        reached = self._reached.get(key)
        if reached and not self._given_up:
            device = next(iter(point.parameters.values())).device
            before = every_random_state(device)
            try:
                with _quiet():
                    found = self._run(game, reached, start, run, inputs, every)
                    if not self._compared:

                        def single(point: Point, pair: Pair, settings: Any) -> Point:
                            return self._run(game, reached, point, [pair], settings, every)[0][0]

                        given = _alike(game, start, run[0], inputs)
                        compare(single, step, given, before[0], device)
                self._compared = self._serves = True
                return found
            except Exception as error:  # a backend may raise anything; the eager step goes on
                set_every_random_state(before, device)
                step(point, run[0], settings)  # an error of the user's passes through
                set_every_random_state(before, device)
                if self._serves and self._lengths:
                    self._lengths = False  # such as dropout, in torch.func: every length anew
                elif self._whole and (game.transform_gradients or game.project):
                    self._whole = False  # the user's functions run as they are
                else:
                    self._give_up(cause(error, self._code))
                return self._some(step, game, point, run, settings, every)
        if not self._given_up and reached is None:
            self._reached[key] = self._prepare(game, start, run[0], inputs)
            return self._some(step, game, point, run, settings, every)
        following = step(point, run[0], settings)
        return [following], [following.loss]

    def _run(
        self,
        game: Game,
        reached: tuple[str, ...],
        point: Point,
        run: Sequence[Pair],
        settings: Any,
        every: bool,
    ) -> tuple[list[Point], list[Tensor]]:
        """Take the steps that one piece of code serves, the first one at least."""
        whole = self._whole and game.optimizer.traceable
        start, pair, _ = _alike(game, point, run[0], settings)
        carried, used = _carried(start, whole), settings if whole else None
        update_of = (game.optimizer, game.transform_gradients, game.project)
        played = Played(
            game.discriminator.module,
            game.objective,
            numbers(game.objective),
            *(update_of if whole else (None, None, None)),
        )
        with (
            stance("default"),
            # Hooks that D gets later are part of it, too.
            torch._dynamo.config.patch(
                skip_nnmodule_hook_guards=False, automatic_dynamic_shapes=self._lengths
            ),
        ):
            result, loss = self._function(played, reached, carried, used, pair)
        entered, self._last = self._last, None
        if entered is None:
            raise RuntimeError("torch.compile is switched off")
        flat = {id(pair): tensors(pair) for pair in run}
        found, losses = trajectory(
            entered,
            tensors((carried, used, pair)),
            tensors((_carried(point, whole), used, run[0])),
            [*tensors(result), loss],
            [flat[id(pair)] for pair in run],
            chained=whole and form(result) == form(carried),
            every=every,
        )
        points = []
        for values, loss in zip(found, losses[-len(found) :], strict=True):
            parameters, buffers, state = filled(result, values)
            if not whole:
                parameters, state = update(
                    game, point.parameters, parameters, point.optimizer_state, settings
                )
            points.append(Point(parameters, buffers, state, loss))
        return points, losses

    def _prepare(self, game: Game, point: Point, pair: Pair, settings: Any) -> tuple[str, ...]:
        """Return the parameters that D's loss depends on; give up where code cannot serve.

        None at a fresh optimizer's first step, which is not worth compiling.
        """
        if any(t.layout != torch.strided for t in tensors((point, pair))):
            self._give_up("a tensor in the batch or a buffer of D is sparse")
            return ()
        device = next(iter(point.parameters.values())).device
        module, state = game.discriminator.module, every_random_state(device)
        also = [*summands(game.objective), game.transform_gradients, game.project]
        theta = leaves(point.parameters, game.moving)
        found = []
        with preserved(module, also):
            for _ in range(2):
                with replayed(state[0], device):
                    loss, gradients, buffers = differentiate(
                        game, theta, point.buffers, pair, create_graph=False
                    )
                    before = point.optimizer_state
                    moved, after = update(game, theta, gradients, before, settings)
                parts = [p for p in (*module.modules(), *also) if hasattr(p, "__dict__")]
                kept: Any = None
                with suppress(RecursionError):  # of a dict that holds itself
                    kept = form([vars(part) for part in parts])
                found.append((kept, tensors((loss, moved, after, buffers))))
        set_every_random_state(state, device)
        (attributes, values), (attributes_then, values_then) = found
        close = same if device.type == "cpu" else partial(torch.allclose, equal_nan=True)
        if attributes != attributes_then or not all(map(close, values, values_then)):
            self._give_up(
                "D, the objective or another function of yours keeps state in attributes, or draws "
                "from Python's or NumPy's generator, which compiled code would not see (register "
                "buffers, draw from torch's)"
            )
        if buffers.keys() != point.buffers.keys():
            self._give_up("D makes or drops a buffer as it runs")
        return tuple(gradients) if _size(before) == _size(after) else ()

    def _give_up(self, reason: str) -> None:
        """Stay eager from now on, and say why, once."""
        if not self._given_up:
            self._given_up = True
            warn(
                f"compile: the look-ahead runs uncompiled, with the same result: {reason}. Set "
                "compile=False, which does the same without this warning."
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


def _alike(game: Game, point: Point, pair: Pair, settings: Any) -> tuple[Point, Pair, Any]:
    """Return what a step starts from, so that one piece of compiled code serves all k."""
    if not torch.is_grad_enabled():
        constants: tuple[Point, Pair, Any] = map_tensors(Tensor.detach, (point, pair, settings))
        return constants

    def same(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    def flat(tensor: Tensor) -> Tensor:  # of the state; its numbers are constants
        return tensor.detach().requires_grad_(tensor.dim() == 1)

    theta = {n: p.detach().requires_grad_(n in game.moving) for n, p in point.parameters.items()}
    state = point.optimizer_state
    if game.optimizer.traceable:
        state = map_tensors(flat, state)
    point = Point(theta, map_tensors(same, point.buffers), state, point.loss)
    return point, map_tensors(same, pair), settings


def _carried(point: Point, whole: bool) -> Carried:
    state = point.optimizer_state if whole else None
    return dict(point.parameters), dict(point.buffers), state


def _form(pair: Pair) -> Hashable:
    """Return the form of a pair, and which of its tensors are the same or require a gradient."""
    found = tensors(pair)
    numbers = {id(t): i for i, t in enumerate(found)}
    return form(pair), *((numbers[id(t)], t.requires_grad) for t in found)


def _size(state: Any) -> int:
    """Return the number of elements in the flat vectors of a state."""
    return sum(t.numel() for t in tensors(state) if t.dim() == 1)
