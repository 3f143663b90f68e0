"""Steps on record: one of the user's loop beside one of the look-ahead from the same point."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle
from torchopt.pytree import tree_leaves, tree_paths

from unroll._functional import Pair, map_tensors, preserved, tensors
from unroll._inspection import refuse_changed
from unroll._look_ahead import (
    Game,
    Gradients,
    Point,
    differentiable,
    differentiate,
    inner_step,
    leaves,
    update,
)
from unroll._loss import UnrolledGeneratorLoss
from unroll._modes.comparison import perturbed
from unroll._objectives import Objective
from unroll._probes import ends, probabilities
from unroll._random import every_random_state, set_every_random_state

TOLERANCE = 1e-4  # relative, beyond round-off
Numbers = dict[Any, Tensor]  # in float64


class Call:
    """One call of the user's ``step`` beside a step of the look-ahead from the same point."""

    def __init__(
        self, loss: UnrolledGeneratorLoss, optimizers: Sequence[Any], step: Any, batch: Pair
    ) -> None:
        self.loss, self.pair = loss, map_tensors(lambda t: t.detach().clone(), batch)
        self.device = next(loss.discriminator.parameters()).device
        self.random = every_random_state(self.device)
        self.game, self.point = self._standing()
        self.start = double(self.point.parameters)
        theta = self.point.parameters.values()
        self.eps = max(torch.finfo(p.dtype).eps for p in theta if p.is_floating_point())
        settings = self.game.optimizer.settings
        settings = settings if isinstance(loss.optimizer, list) else [settings]
        self.settings = [group for groups in settings for group in groups]
        self.left = double(self._own_gradients())
        self.counts = [0] * len(optimizers)  # steps that each optimizer takes
        self.reached: dict[str, Tensor] = {}  # gradients at the first of them
        self.held: Numbers = {}  # parameters there that the optimizers have
        self.switched: list[nn.Module] = []  # layers there in another mode than before
        self.moved: list[str] = []
        self.zeros: list[str] = []  # of those moved, where zeros stand for no gradient
        self.outside: list[str] = []  # of those moved, what no optimizer of the loss has
        self.state: list[Any] = []
        ahead, nudged = self._look_ahead()
        self._take(step, optimizers)
        self._compare_gradients(ahead, nudged)
        if set(self.counts) == {1} and self.reached:
            self._compare_updates(self.reached.keys() - ahead.keys())
        self.wrong = bool(self.off or self.strangers or self.moved or self.state or self.modes)

    def gradients(
        self,
        objective: Objective,
        pair: Pair | None = None,
        change: Callable[[Tensor], Tensor] = torch.clone,
    ) -> tuple[Numbers, Numbers]:
        """Return gradients in a look-ahead step of a game, before and after their transform."""
        set_every_random_state(self.random, self.device)
        raw: Gradients = {}
        found: Gradients = {}

        def record(gradients: Gradients) -> Gradients:
            raw.update(gradients)
            found.update((self.game.transform_gradients or dict)(gradients))
            return found

        game = replace(self.game, transform_gradients=record, objective=objective)
        given = self.point, pair or self.pair, game.optimizer.settings
        with preserved(*self.loss._parts), torch.no_grad():
            inner_step(game)(*map_tensors(lambda t: change(t.detach()), given))
        return double(raw), double(found)

    def _standing(self) -> tuple[Game, Point]:
        """Return the look-ahead's game, and the point where D and its optimizer stand now."""
        with preserved(*self.loss._parts), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the next look-ahead says it again
            return self.loss._start(None)

    def _own_gradients(self) -> dict[str, Tensor]:
        own = self.loss.discriminator.named_parameters()
        return {n: p.grad for n, p in own if p.is_leaf and p.grad is not None}

    def _look_ahead(self) -> tuple[Numbers, list[Numbers]]:
        """Return the gradients of the look-ahead's step, and of steps that round otherwise."""
        game, objective = self.game, self.loss.objective
        theta = leaves(self.point.parameters, game.moving)
        with preserved(*self.loss._parts):
            d_loss, *_ = differentiate(game, theta, self.point.buffers, self.pair, False)
            refuse_changed(game.discriminator, theta)
        used = set(ends([d_loss], tensors(self.pair)))
        self.strangers = [str(tuple(t.shape)) for t in game.optimizer.others if t in used]
        with probabilities(*self.loss._parts) as self.sigmoid:
            self.raw, found = self.gradients(objective)
        self.drawn = every_random_state(self.device)
        self.unlike = relative(found, self.gradients(objective)[1]) > TOLERANCE
        nudged = partial(self.gradients, objective, change=perturbed)
        try:
            with _rounding_otherwise():
                return found, [nudged()[1] for _ in range(3)]
        except RuntimeError:  # of code that differentiates in what a layer returns, its input
            return found, [nudged()[1]]

    def _take(self, step: Any, optimizers: Sequence[Any]) -> None:
        """Take the user's step, and look at D where an optimizer takes its own."""
        set_every_random_state(self.random, self.device)
        modes = {layer: layer.training for layer in self.loss.discriminator.modules()}
        with ExitStack() as stack:
            for i, one in enumerate(optimizers):
                look = partial(self._look, i, one, modes)
                if isinstance(one, torch.optim.Optimizer):
                    stack.enter_context(one.register_step_pre_hook(partial(_before_step, look)))
                else:
                    stack.callback(vars(one).pop, "step")
                    one.step = partial(_step, look, one.step)
            # As for an objective: a penalty may differentiate in the fakes.
            step(*map_tensors(torch.clone, (differentiable(self.pair[0]), self.pair[1])))
        states = self.random, self.drawn, every_random_state(self.device)
        self.drew = len({repr([*map(Tensor.tolist, tensors(s[0])), *s[1:]]) for s in states}) > 1
        self.early = [n for n, p in self.held.items() if not torch.equal(p, self.start[n])]
        finite = all(bool(g.isfinite().all()) for g in self._own_gradients().values())
        self.skipped = not finite and not any(self.counts)  # by a GradScaler

    def _look(
        self, i: int, optimizer: Any, modes: Mapping[nn.Module, bool], closure: Any = None
    ) -> Any:
        """Record what an optimizer's first step gets: parameters alone hide a loss's scale."""
        value = closure() if closure else None  # which brings the gradients
        self.counts[i] += 1
        if self.counts[i] == 1:
            own = set(tensors(optimizer.param_groups))
            held = {n: p for n, p in self.loss.discriminator.named_parameters() if p in own}
            scale = getattr(optimizer, "grad_scale", None)  # a GradScaler's, for a fused step
            for name, p in held.items():
                if p.grad is not None:
                    self.reached[name] = p.grad.clone() if scale is None else p.grad / scale
            self.held |= double(held)
            self.switched = [layer for layer, mode in modes.items() if layer.training is not mode]
        return value

    def _compare_gradients(self, ahead: Numbers, nudged: Sequence[Numbers]) -> None:
        none = {n: torch.zeros_like(p) for n, p in self.held.items()}
        self.ours, *others = ({n: g.get(n, z) for n, z in none.items()} for g in (ahead, *nudged))
        self.untaken = none.keys() - ahead.keys()  # no steps of the look-ahead
        self.real = none | double(self.reached)
        self.size, self.error = norm(self.ours), relative(self.ours, self.real)
        # The largest of several: one nudge may leave a sum of a few numbers as it is.
        times = 4 if torch.is_autocast_enabled(self.device.type) else 10
        moves = [_sizes(minus(other, self.ours), times) for other in others]
        noise = {n: max(sizes[n] for sizes in moves) for n in none}
        self.noise = sum(v**2 for v in noise.values()) ** 0.5
        floors = {n: 10 * self.eps * self.size + v for n, v in noise.items()}
        self.off = _differing(self.ours, self.real, floors)
        certain = self.noise <= 0.3 * self.size or self.error <= TOLERANCE  # more than chance
        self.telling = certain and self.size > 0
        # Norms in another mode show in the gradients; dropout is off.
        kinds = (_DropoutNd, _NormBase) if self.off else _DropoutNd
        self.modes = [layer for layer in self.switched if isinstance(layer, kinds)]

    def _compare_updates(self, skipped: Collection[str]) -> None:
        """Compare the update for the loop's gradients: Adam magnifies their round-off."""
        game, landed = self._standing()
        before, settings = self.point.optimizer_state, self.game.optimizer.settings
        alone = replace(self.game, transform_gradients=None)
        with torch.no_grad():
            theta, after = update(alone, self.point.parameters, self.reached, before, settings)
        # The look-ahead's own step skips parameters that have no gradient in it.
        expected = double(theta) | {n: self.start[n] for n in skipped}
        ours, real = (minus(p, self.start) for p in (expected, double(landed.parameters)))
        self.moved = _differing(ours, real, _sizes(self.start, 4 * self.eps))
        self.zeros = [n for n in self.moved if n in skipped]
        self.outside = [n for n in self.moved if n not in self.ours]
        old, new = (_entries(self.game.optimizer.export(state)) for state in (before, after))
        actual = _entries(game.optimizer.export(landed.optimizer_state))
        self.state = _differing(new, actual, _sizes(old, 4 * self.eps))
        if not self.off:
            self.error = max(self.error, relative(ours, real))


def _before_step(look: Callable[..., Any], _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Look before a step of torch, or as part of the closure that brings the gradients."""
    closure: Any = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return look()
    return args[:1], {**kwargs, "closure": partial(look, closure)}


def _step(look: Callable[..., Any], step: Callable[..., Any], closure: Any = None) -> Any:
    return step(partial(look, closure))


def _rounding_otherwise() -> RemovableHandle:
    """Let every layer's output, and the gradient in it, be off by a few units in the last place.

    What a gradient sums up may cancel, by sample or by call of D, but not its round-off, which
    nudged inputs do not show. Hence a fast pattern and a slow one.
    """
    draw = Random(0).random  # nothing of the user's draws from it

    def off(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        wide = torch.promote_types(t.dtype, torch.float32)
        along = torch.linspace(0, 3, t.numel(), dtype=wide, device=t.device).view(t.shape)
        waves = [(rate * draw() * along + 6 * draw()).cos() for rate in (1, t.numel())]
        size = (8 if t.dtype == wide else 0.4) * torch.finfo(t.dtype).eps  # autocast's is large
        return (t * (1 + size * (waves[0] + waves[1]))).to(t.dtype)

    return register_module_forward_hook(lambda _, __, output: map_tensors(off, output))


def _entries(states: Any) -> Numbers:
    """Return the numbers in the state of one or several optimizers, by their paths in it."""
    values = map(torch.as_tensor, tree_leaves(states))
    return double(dict(zip(tree_paths(states), values, strict=True)))


def double(tensors: Mapping[Any, Tensor]) -> Numbers:
    """Return copies in float64."""
    return {n: t.detach().clone().cpu().double() for n, t in tensors.items()}


def minus(one: Numbers, other: Numbers) -> Numbers:
    """Return the differences."""
    return {name: value - other[name] for name, value in one.items()}


def norm(tensors: Numbers) -> float:
    """Return the norm of all of them."""
    return float(sum(size**2 for size in _sizes(tensors).values()) ** 0.5)


def _sizes(tensors: Numbers, times: float = 1.0) -> dict[Any, float]:
    return {n: times * float(t.norm()) for n, t in tensors.items()}


def _differing(ours: Numbers, real: Numbers, floors: Mapping[Any, float]) -> list[Any]:
    """Return the names of what both have and what differs by more than round-off."""
    common = {n: v for n, v in ours.items() if n in real}
    allowed = {n: size + floors.get(n, 0.0) for n, size in _sizes(common, TOLERANCE).items()}
    return [n for n, v in common.items() if not float((v - real[n]).norm()) <= allowed[n]]


def relative(ours: Numbers, real: Numbers) -> float:
    """Return the difference, relative to ``ours``."""
    gap, size = norm(minus(ours, real)), norm(ours)
    return gap / size if size else float(gap > 0)
