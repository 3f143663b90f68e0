"""The search of the first call: a step of D whose graph is looked through for what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unroll._autograd_fixes import RECOMPUTATION, inner_gradients, recomputation_refused
from unroll._functional import MUTATION, Functional, Pair, map_tensors, preserved, tensors
from unroll._look_ahead import (
    Game,
    Gradients,
    Point,
    Value,
    differentiate,
    generator_value,
    inner_step,
    leaves,
    update,
)
from unroll._modes.checkpointed import refuse_unrepeatable
from unroll._probes import (
    ends,
    graph,
    has_dead_ends,
    lost_derivatives,
    probabilities,
    read_elsewhere,
    without_derivative,
)
from unroll._random import every_random_state, set_every_random_state
from unroll._validation import same, warn

DETACHED_FAKES = (
    "objective: discriminator_loss does not depend on the fakes (are they detached?), so the "
    "second term of Eq. 12 is zero. Use `fake` as it is given, or say stop_gradient=True if the "
    "first term alone is meant."
)
ANOTHER_D = (
    "objective: generator_loss does not depend on the discriminator that it is given (does it call "
    "a copy of D, such as an average of its weights?), so looking ahead changes nothing. Call the "
    "`discriminator` argument."
)
SHARED = (
    "fake, real: made with the parameter {!r} of the discriminator, which the generator uses, too. "
    "D's parameters are constants in its loss: the gradient comes through the batch alone and "
    "lacks what an ordinary loss adds through D. Give D a copy, or let only D's optimizer train it."
)
_WRONG = ("WeightNormInterfaceBackward", "NativeLayerNormBackwardBackward")


@dataclass
class Inspection:
    """The search of a loss: once for every form of D, its layers, modes and what is frozen."""

    parts: tuple[nn.Module, Sequence[object]]  # what is preserved: D, summands of the objective
    stop_gradient: bool
    checkpoint: bool
    average: bool
    searched: dict[Any, bool] = field(default_factory=dict)  # whether D checkpoints activations

    def inspect_steps(
        self, game: Game, point: Point, batch: Pair, pair: Pair, *, graph: bool
    ) -> None:
        """Search a step on ``pair``, and f on ``batch`` where there will be a ``graph`` of them."""
        game = replace(game, mean=None)  # a rank searches when its own D is new to it
        d, value = game.discriminator, generator_value(game.discriminator, game.objective)
        theta = leaves(point.parameters, game.moving)
        with self._leaving_nothing_behind():
            batch, pair = map_tensors(Tensor.clone, (batch, pair))  # D may change its input

            def d_loss() -> Tensor:
                return differentiate(game, theta, point.buffers, pair, create_graph=False)[0]

            if self.stop_gradient or not graph:
                loss, following = d_loss(), point
                learns = loss.requires_grad  # the step itself refuses a loss without D
                refuse_changed(d, theta)
                _refuse_unregistered(game, loss, tensors(pair))
            else:
                following = inspect_step(game, point, pair)
                learns = following is not point  # there were gradients
                if self.checkpoint and learns:
                    given = point, pair, game.optimizer.settings
                    refuse_unrepeatable(inner_step(game), *self.parts, given)
                if self.checkpoint and self.average:
                    refuse_unrepeatable(value, *self.parts, (following, batch))
            if graph:
                ahead = leaves(map_tensors(Tensor.detach, following.parameters), game.moving)
                following = following._replace(parameters=ahead)
                f = inspect_value(self.parts[0], value, following, batch)
                if learns and set(ahead.values()).isdisjoint(ends([f], tensors(batch))):
                    warn(ANOTHER_D)
            for player in (d_loss, partial(value, point, batch)):
                _refuse_use_of(read_elsewhere(d, game.moving, player))
        self.searched[d.layers, game.moving, graph] = False

    def recomputes(self, d: Functional, value: Value, point: Point, batch: Pair) -> bool:
        """Return whether D checkpoints activations in f_0, after a search of that."""
        if d.layers not in self.searched:
            found = False
            with self._leaving_nothing_behind():
                batch = map_tensors(Tensor.clone, batch)  # D may change its input
                try:
                    with recomputation_refused():
                        inspect_value(self.parts[0], value, point, batch)
                except RuntimeError as error:
                    found = str(error).startswith(RECOMPUTATION)
                    if not found:
                        raise
                refuse_changed(d, point.parameters)
            self.searched[d.layers] = found
        return self.searched[d.layers]

    @contextmanager
    def _leaving_nothing_behind(self) -> Iterator[None]:
        """Let D be run: random numbers are drawn again afterwards, and D is preserved."""
        device = next(self.parts[0].parameters()).device
        state = every_random_state(device)
        try:
            with preserved(*self.parts), probabilities(*self.parts) as found:
                yield
        finally:
            set_every_random_state(state, device)
        for text in found:
            warn(text)


def inspect_step(game: Game, point: Point, pair: Pair) -> Point:
    """Take one step at theta_D^0 with a graph and refuse what would go wrong; return theta_D^1."""
    discriminator = game.discriminator
    module = discriminator.module
    _refuse_layers(module)
    theta = leaves(point.parameters, game.moving)
    loss, gradients, buffers = differentiate(game, theta, point.buffers, pair, create_graph=True)
    batch = tensors(pair)
    _refuse_reentrant_checkpoints(loss, batch)
    if not gradients:  # the step itself refuses this; with `sync`, other ranks may have some
        return point
    settings = game.optimizer.settings
    moved, state = update(game, theta, gradients, point.optimizer_state, settings)
    refuse_changed(discriminator, theta)
    _refuse_unregistered(game, loss, batch)
    _refuse_use_of(_own_parameter(module, [loss], batch))
    _refuse_wrong_derivatives(loss, batch)
    updated = _own_parameter(module, [*moved.values(), *tensors(state)], [loss, *batch])
    if updated is not None:
        raise RuntimeError(
            f"project, optimizer: the update uses D's parameter {updated!r} itself (from a closure "
            "of project=, of a transformation or of a gradient hook), which would get a gradient. "
            "Use what they are given, theta_D^k; where theta_D^0 is meant, parameter.detach()."
        )
    forward = partial(discriminator, lambda d: d(pair[1]), theta, point.buffers)
    _inspect_derivatives(module, forward, theta, tensors(pair[0]), loss, gradients)
    return Point(moved, buffers, state, loss.detach())


def refuse_changed(discriminator: Functional, theta: Mapping[str, Tensor]) -> None:
    """Refuse a D that has changed its parameters, theta_D^0: .data leaves no other trace."""
    for name, own in discriminator.parameters.items():
        if not same(theta[name], own):
            raise RuntimeError(MUTATION.format(name))


def inspect_value(module: nn.Module, value: Value, point: Point, pair: Pair) -> Tensor:
    """Return f; refuse it if D's real parameters reach it, warn if the generator uses one, too."""
    f = value(point, pair)
    reached = tensors((pair, point))
    if shared := _own_parameter(module, tensors(pair), ()):
        warn(SHARED.format(shared))
    _refuse_reentrant_checkpoints(f, reached)
    _refuse_use_of(_own_parameter(module, [f], reached))
    return f


def _refuse_unregistered(game: Game, loss: Tensor, until: Iterable[Tensor]) -> None:
    """Refuse tensors that the optimizer trains and D's loss uses, but that are no parameters."""
    others = set(game.optimizer.others)
    trained = [b for b in game.discriminator.buffers.values() if b.requires_grad]
    used = [*ends([loss], until), *trained]
    if found := [tensor for tensor in used if tensor in others]:
        shapes = ", ".join(str(tuple(t.shape)) for t in found)
        raise RuntimeError(
            "discriminator: the optimizer trains tensors that D's loss uses, but that are not "
            f"parameters of the discriminator (shapes {shapes}), so that the look-ahead would "
            "leave them where they are. Register them: layers in an nn.ModuleList, a tensor as an "
            "nn.Parameter, an encoder or a learned temperature in one nn.Module together with D."
        )


def _refuse_wrong_derivatives(loss: Tensor, until: Iterable[Tensor]) -> None:
    """Refuse norms whose wrong derivative was not replaced, and gradients divided by counts."""
    nodes = graph([loss], until)
    replacements = [node for node in nodes if node.name().startswith("_NormGradients")]
    known = {following for node in replacements for following, _ in node.next_functions}
    if hidden := [n.name() for n in nodes - known if n.name().startswith(_WRONG)]:
        raise RuntimeError(
            f"discriminator: PyTorch's derivative of {hidden[0]} is wrong, and the look-ahead "
            "replaces it in calls from Python alone, not in code of torch.jit and torch.export or "
            "in torch.ops.aten. Call torch.nn.functional and torch.nn.utils.parametrizations, or "
            "set stop_gradient=True for the first term alone."
        )
    # Embeddings may divide gradients by counts: PyTorch differentiates past that.
    if any(getattr(node, "_saved_scale_grad_by_freq", False) for node in nodes):
        raise RuntimeError(
            "discriminator: scale_grad_by_freq=True of an embedding makes gradients that are no "
            "derivatives of D's loss. Set it to False, or stop_gradient=True of the loss."
        )


def _refuse_reentrant_checkpoints(loss: Tensor, until: Iterable[Tensor]) -> None:
    """Refuse the form of activation checkpointing that hooks no tensors."""
    if any(node.name().startswith("CheckpointFunction") for node in graph([loss], until)):
        raise RuntimeError(RECOMPUTATION)


def _refuse_use_of(name: str | None) -> None:
    """Refuse a loss that uses a real parameter of D, by its name."""
    if name is not None:
        raise RuntimeError(
            f"discriminator, objective: the loss uses D's parameter {name!r} other than "
            "through the discriminator it is given (from a closure, or D keeps it in a plain "
            "list), so the look-ahead cannot put theta_D^k in its place. Call the "
            "`discriminator` argument; in D, read parameters as attributes."
        )


def _own_parameter(
    module: nn.Module, outputs: Iterable[Tensor], until: Iterable[Tensor]
) -> str | None:
    """Return a real parameter of D that outputs depend on other than through ``until``."""
    own: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    return next((own[tensor] for tensor in ends(outputs, until) if tensor in own), None)


def _refuse_layers(module: nn.Module) -> None:
    """Refuse layers whose second derivative is wrong in a way that no graph shows."""
    for name, layer in module.named_modules():
        syncs = isinstance(layer, nn.SyncBatchNorm) and layer.training and dist.is_available()
        if syncs and dist.is_initialized() and dist.get_world_size(layer.process_group) > 1:
            raise RuntimeError(
                f"discriminator: {name or 'itself'} (SyncBatchNorm) has no right second derivative "
                "in training mode. Use BatchNorm, whose statistics are those of each rank, or "
                "GroupNorm, or set stop_gradient=True for the first term alone."
            )


def _inspect_derivatives(
    module: nn.Module,
    forward: Callable[[], object],
    theta: Mapping[str, Tensor],
    fakes: Sequence[Tensor],
    loss: Tensor,
    gradients: Gradients,
) -> None:
    """Refuse layers without the derivatives that Eq. 12 needs; warn of detached fakes."""
    fakes = [fake for fake in fakes if fake.requires_grad]
    outputs = [g for g in gradients.values() if g.requires_grad]
    points = [*fakes, *(p for p in theta.values() if p.requires_grad)]
    found: Sequence[Tensor | None] = [None] * len(points)
    if outputs:
        try:
            with lost_derivatives(graph([loss], fakes)) as lost:
                inner_gradients(loss, [theta[name] for name in gradients], create_graph=True)
            if lost or has_dead_ends(outputs, fakes):
                raise RuntimeError(f"a derivative is not implemented {lost}")
            found = torch.autograd.grad(
                outputs, points, [g.detach() for g in outputs], retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            named = without_derivative(module, forward)
            if not named and "not implemented" not in str(error):
                raise
            raise RuntimeError(
                "discriminator: the look-ahead needs a derivative that PyTorch does not have, in "
                f"{', '.join(named) or 'discriminator_loss of the objective'} (a gradient penalty "
                "needs one order more). Replace it (plain operations for a fused kernel), or set "
                "stop_gradient=True for the first term alone."
            ) from error
    if fakes and all(g is None for g in found[: len(fakes)]):
        warn(DETACHED_FAKES)
