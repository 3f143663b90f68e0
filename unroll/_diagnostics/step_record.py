"""Steps on record: one of the user's loop beside one of the look-ahead from the same point."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from torchopt.pytree import tree_leaves

from unroll._functional import Pair, map_tensors, preserved, tensors
from unroll._inspection import refuse_changed
from unroll._look_ahead import (
    Gradients,
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
        module, self.loss = loss.discriminator, loss
        self.pair = map_tensors(lambda t: t.detach().clone(), batch)
        self.device = next(module.parameters()).device
        self.random = every_random_state(self.device)
        with preserved(*loss._parts), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the next look-ahead says it again
            self.game, self.point = loss._start(None)
            at_start = leaves(self.point.parameters, self.game.moving)
            d_loss, *_ = differentiate(self.game, at_start, self.point.buffers, self.pair, False)
            refuse_changed(self.game.discriminator, at_start)
            used = set(ends([d_loss], tensors(self.pair)))
        self.start, optimizer = double(self.point.parameters), self.game.optimizer
        settings = optimizer.settings
        settings = settings if isinstance(loss.optimizer, list) else [settings]
        self.settings = [group for groups in settings for group in groups]
        with probabilities(*loss._parts) as self.sigmoid:
            found, drawn = self.gradients(loss.objective), every_random_state(self.device)
        again = self.gradients(loss.objective)  # from the same state
        self.unlike = [n for n in _differing(found, again, {}) if bool(found[n].isfinite().all())]
        nudge = partial(self.gradients, loss.objective, change=perturbed)
        try:
            with _rounding_otherwise():
                nudged = [nudge() for _ in range(3)]
        except RuntimeError:  # of code that differentiates in what a layer returns, its input
            nudged = [nudge()]
        set_every_random_state(self.random, self.device)
        grads = {n: p.grad for n, p in module.named_parameters() if p.is_leaf}
        self.left = double({n: g for n, g in grads.items() if g is not None})
        aside = [(t, t._version) for t in optimizer.others if t in used]
        layers = [m for m in module.modules() if isinstance(m, (_DropoutNd, _NormBase))]
        modes = [layer.training for layer in layers]
        with _observed(optimizers, module) as (self.counts, reached, held, in_step):
            # As for an objective: a penalty may differentiate in the fakes.
            step(*map_tensors(torch.clone, (differentiable(self.pair[0]), self.pair[1])))
        others = zip(layers, modes, map(in_step.get, layers), strict=True)
        # Layers in another mode in `step`: norms that differ show in the gradients.
        self.modes = [layer for layer, mode, then in others if then is not None and then != mode]
        then = [p.grad for p in module.parameters() if p.is_leaf and p.grad is not None]
        finite = all(bool(g.isfinite().all()) for g in then)
        self.skipped = not finite and not any(self.counts)  # by a GradScaler
        states = self.random, drawn, every_random_state(self.device)
        self.drew = len({repr([*map(Tensor.tolist, tensors(s[0])), *s[1:]]) for s in states}) > 1
        self.strangers = [str(tuple(t.shape)) for t, old in aside if t._version != old]
        self.early = [n for n, p in held.items() if not torch.equal(p, self.start[n])]

        none = {n: torch.zeros_like(self.start[n]) for n in held}
        taking = found.keys() & none.keys()  # that take a step of the look-ahead
        found, *nudged = ({n: g.get(n, z) for n, z in none.items()} for g in (found, *nudged))
        self.ours, self.real = found, none | double(reached)
        theta, self.size = self.point.parameters, norm(self.ours)
        eps = max(torch.finfo(p.dtype).eps for p in theta.values() if p.is_floating_point())
        # The largest of several: one nudge may leave a sum of a few numbers as it is.
        times = 4 if torch.is_autocast_enabled(self.device.type) else 10
        noise = {n: times * max(float((g[n] - found[n]).norm()) for g in nudged) for n in none}
        self.noise = sum(v**2 for v in noise.values()) ** 0.5
        floors = {n: 10 * eps * self.size + v for n, v in noise.items()}
        self.off = _differing(self.ours, self.real, floors)
        self.error = _relative(self.ours, self.real)
        certain = self.noise <= 0.3 * self.size or self.error <= TOLERANCE  # more than chance
        self.telling = certain and self.size > 0

        # The update is compared for the loop's gradients: Adam magnifies their round-off.
        self.moved: list[str] = []
        self.zeros: list[str] = []  # of those moved, where zeros stand for no gradient
        self.state: list[Any] = []
        if set(self.counts) == {1} and reached:
            game = replace(self.game, transform_gradients=None)
            gradients = {n: reached.get(n, torch.zeros_like(theta[n])) for n in taking}
            given = self.point.optimizer_state, optimizer.settings
            with torch.no_grad():
                after, _ = update(game, theta, gradients, *given)
                _, state = update(game, theta, reached, *given)  # counts steps, on zeros too
            named = dict(module.named_parameters())
            ours, real = (minus(double(moved), self.start) for moved in (after, named))
            self.moved = _differing(ours, real, _sizes(self.start, 4 * eps))
            self.zeros = [n for n in self.moved if n in reached and n not in taking]
            before, wanted = (_entries(optimizer.export(s)) for s in (given[0], state))
            actual = _entries([_live_state(one, named) for one in optimizers])
            self.state = _differing(wanted, actual, _sizes(before, 4 * eps))
            if not self.off:
                self.error = max(self.error, _relative(ours, real))
        if not self.off:
            self.modes = [layer for layer in self.modes if isinstance(layer, _DropoutNd)]
        self.wrong = bool(self.off or self.strangers or self.moved or self.state or self.modes)

    def gradients(
        self,
        objective: Objective,
        pair: Pair | None = None,
        change: Callable[[Tensor], Tensor] = torch.clone,
        *,
        raw: bool = False,
    ) -> Numbers:
        """Return the gradients that reach the optimizer in a look-ahead step of a game.

        Or, if ``raw``, those that reach transform_gradients.
        """
        set_every_random_state(self.random, self.device)
        transform = None if raw else self.game.transform_gradients
        found: Gradients = {}

        def record(gradients: Gradients) -> Gradients:
            found.update((transform or dict)(gradients))
            return found

        game = replace(self.game, transform_gradients=record, objective=objective)
        given = self.point, pair or self.pair, game.optimizer.settings
        with preserved(*self.loss._parts), torch.no_grad():
            inner_step(game)(*map_tensors(lambda t: change(t.detach()), given))
        return double(found)


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


@contextmanager
def _observed(
    optimizers: Sequence[Any], module: nn.Module
) -> Iterator[tuple[list[int], dict[str, Tensor], Numbers, dict[nn.Module, bool]]]:
    """Count the steps of each optimizer; record gradients and parameters at the first, and modes.

    Parameters alone hide a loss's scale.
    """
    counts = [0] * len(optimizers)
    gradients: dict[str, Tensor] = {}
    parameters: Numbers = {}
    modes: dict[nn.Module, bool] = {}

    def looking(i: int, closure: Any = None) -> Any:
        value = closure() if closure else None  # which brings the gradients
        counts[i] += 1
        if counts[i] == 1:
            own = set(tensors(optimizers[i].param_groups))
            held = {n: p for n, p in module.named_parameters() if p in own}
            scale = getattr(optimizers[i], "grad_scale", None)  # a GradScaler's, for a fused step
            for name, p in held.items():
                if p.grad is not None:
                    gradients[name] = p.grad.clone() if scale is None else p.grad / scale
            parameters.update(double(held))
            modes.update((part, part.training) for part in module.modules())
        return value

    def hook(i: int, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        closure: Any = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return looking(i)
        return args[:1], {**kwargs, "closure": partial(looking, i, closure)}

    def stepping(i: int, step: Any, closure: Any = None) -> Any:
        return step(partial(looking, i, closure))

    with ExitStack() as stack:
        for i, one in enumerate(optimizers):
            if isinstance(one, torch.optim.Optimizer):
                stack.enter_context(one.register_step_pre_hook(partial(hook, i)))
            else:
                stack.callback(vars(one).pop, "step")
                one.step = partial(stepping, i, one.step)
        yield counts, gradients, parameters, modes


def _live_state(optimizer: Any, named: Mapping[str, Tensor]) -> Any:
    if isinstance(optimizer, torch.optim.Optimizer):
        return {n: optimizer.state[p] for n, p in named.items() if p in optimizer.state}
    return optimizer.state_groups


def _entries(states: Any) -> Numbers:
    """Return the numbers in one or a list of states, by what they are and of which parameter."""
    found: dict[Any, Any] = {}
    for i, state in enumerate(states if isinstance(states, list) else [states]):
        if isinstance(state, Mapping):
            found |= {(k, name): v for name, entry in state.items() for k, v in entry.items()}
        else:
            found |= {(f"{i}.{j}", ""): v for j, v in enumerate(tree_leaves(state))}
    return double({k: torch.as_tensor(v) for k, v in found.items() if v is not None})


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


def _relative(ours: Numbers, real: Numbers) -> float:
    gap, size = norm(minus(ours, real)), norm(ours)
    return gap / size if size else float(gap > 0)
