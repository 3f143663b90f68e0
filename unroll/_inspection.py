"""The search of the first call: one step of D with its graph, looked through for what goes wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node

from unroll._autograd_fixes import RECOMPUTATION, recomputation_refused
from unroll._functional import (
    FunctionalDiscriminator,
    Pair,
    map_tensors,
    mutation_message,
    tensors,
    views,
)
from unroll._look_ahead import (
    Game,
    Gradients,
    Point,
    Value,
    differentiate,
    leaves,
    update,
)
from unroll._validation import outside_autograd, same

T = TypeVar("T")

DETACHED_FAKES = (
    "objective: discriminator_loss does not depend on the fakes (are they detached?), so the "
    "second term of Eq. 12 is zero. Use `fake` as it is given, or say stop_gradient=True if the "
    "first term alone is meant."
)


def inspect_step(game: Game, point: Point, pair: Pair) -> Point:
    """Take one step at theta_D^0 with a graph and refuse what would go wrong; return theta_D^1."""
    discriminator, pair = game.discriminator, views(pair)
    module = discriminator.module
    _refuse_layers(module)
    theta = leaves(point.parameters, game.moving)
    d = FunctionalDiscriminator(discriminator, theta, point.buffers)
    loss, gradients = differentiate(game, d, pair, create_graph=True)
    if not gradients:  # the step itself refuses this; with `sync`, other ranks may have some
        return point
    settings = game.optimizer.settings
    moved, state = update(game, theta, gradients, point.optimizer_state, settings)
    for name, own in discriminator.parameters.items():  # .data leaves no other trace
        if not same(theta[name], own):
            raise RuntimeError(mutation_message(name))
    batch = tensors(pair)
    _refuse_own_parameters(module, loss, batch)
    updated = _own_parameter(module, [*moved.values(), *tensors(state)], [loss, *batch])
    if updated is not None:
        raise RuntimeError(
            f"project, optimizer: the update uses D's parameter {updated!r} itself (from a closure of "
            "project=, of a transformation or of a gradient hook), which would get a gradient. Use "
            "what they are given, theta_D^k; where theta_D^0 is meant, parameter.detach()."
        )
    if game.project is not None:
        _refuse_projection_outside_autograd(game, theta, gradients, point.optimizer_state)
    _inspect_derivatives(module, theta, gradients, tensors(pair[0]), lambda: d(pair[1]))
    return Point(moved, d.buffers, state, loss.detach())


def inspect_value(module: nn.Module, value: Value, point: Point, pair: Pair) -> Tensor:
    """Return f at a point, after a search for D's real parameters in its graph."""
    f = value(point, pair)
    reached = [*tensors(pair), *point.parameters.values(), *point.buffers.values()]
    _refuse_own_parameters(module, f, reached)
    return f


def recomputes(module: nn.Module, value: Value, point: Point, pair: Pair) -> bool:
    """Return whether D, as f_0 runs it, checkpoints activations; refuse as :func:`inspect_value`."""
    try:
        with recomputation_refused():
            nodes = graph([inspect_value(module, value, point, pair)])
    except RuntimeError as error:
        if str(error).startswith(RECOMPUTATION):
            return True
        raise
    return any(node.name().startswith("CheckpointFunction") for node in nodes)


def _refuse_projection_outside_autograd(
    game: Game, theta: Mapping[str, Tensor], gradients: Gradients, state: Any
) -> None:
    """Refuse a projection that changes values without a trace in the graph, as ``.data`` does."""
    assert game.project is not None
    moved, _ = game.optimizer.step(theta, gradients, state, game.optimizer.settings)
    given = {name: value.clone() for name, value in moved.items()}
    histories = {name: value.grad_fn for name, value in given.items()}
    for name, value in game.project(dict(given)).items():
        untouched = value.grad_fn is histories[name]
        if moved[name].requires_grad and untouched and not same(value, moved[name]):
            raise ValueError(outside_autograd(name))


def _refuse_own_parameters(module: nn.Module, loss: Tensor, until: Iterable[Tensor]) -> None:
    """Refuse a loss that D's real parameters reach; ``until`` are the tensors it may depend on."""
    if (name := _own_parameter(module, [loss], until)) is not None:
        raise RuntimeError(
            f"discriminator, objective: the loss uses D's parameter {name!r} other than "
            "through the discriminator it is given (from a closure, or D keeps it in a plain "
            "list), so the look-ahead cannot put theta_D^k in its place. Call the "
            "`discriminator` argument; in D, read parameters as attributes."
        )


def _own_parameter(
    module: nn.Module, outputs: Iterable[Tensor], until: Iterable[Tensor]
) -> str | None:
    own = {id(p): name for name, p in module.named_parameters()}
    nodes = graph(outputs, [t.grad_fn for t in until if t.grad_fn is not None])
    found = (own.get(id(getattr(node, "variable", None))) for node in nodes)
    return next((name for name in found if name is not None), None)


def warn_of_gradient_hooks(module: nn.Module) -> None:
    """Warn of post-accumulate-grad hooks: they never fire in the look-ahead."""
    for name, parameter in module.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            warnings.warn(
                f"discriminator: parameter {name!r} has post-accumulate-grad hooks, which do not "
                "run in the look-ahead. If one changes gradients, use parameter.register_hook.",
                stacklevel=3,
            )
            return


def _refuse_layers(module: nn.Module) -> None:
    """Refuse layers whose second derivative is wrong in a way that no graph shows."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.SyncBatchNorm) and layer.training and _many_ranks(layer):
            raise RuntimeError(
                f"discriminator: {name or 'itself'} (SyncBatchNorm) has no right second derivative "
                "in training mode. Use BatchNorm, whose statistics are those of each rank, or "
                "GroupNorm, or set stop_gradient=True for the first term alone."
            )


def _many_ranks(layer: nn.SyncBatchNorm) -> bool:
    initialised = dist.is_available() and dist.is_initialized()
    return initialised and dist.get_world_size(layer.process_group) > 1


def _inspect_derivatives(
    module: nn.Module,
    theta: Mapping[str, Tensor],
    gradients: Gradients,
    fakes: Sequence[Tensor],
    forward: Callable[[], object],
) -> None:
    """Refuse layers without the derivatives that Eq. 12 needs; warn of detached fakes."""
    fakes = [fake for fake in fakes if fake.requires_grad]
    outputs = [g for g in gradients.values() if g.requires_grad]
    points = [*fakes, *(p for p in theta.values() if p.requires_grad)]
    found: Sequence[Tensor | None] = [None] * len(points)
    if outputs:
        try:
            if _has_dead_ends(graph(outputs, [t.grad_fn for t in fakes if t.grad_fn is not None])):
                raise RuntimeError("a derivative is not implemented")
            found = torch.autograd.grad(
                outputs, points, [g.detach() for g in outputs], retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            named = _without_derivative(module, forward)
            if not named:
                raise
            raise RuntimeError(
                "discriminator: the look-ahead needs a derivative that PyTorch does not have, in "
                f"{', '.join(named)} (a gradient penalty needs one order more). Replace the layer "
                "(GroupNorm for BatchNorm under a penalty, plain operations for a fused kernel), "
                "or set stop_gradient=True for the first term alone."
            ) from error
    if fakes and all(g is None for g in found[: len(fakes)]):
        warnings.warn(DETACHED_FAKES, stacklevel=2)


def _without_derivative(module: nn.Module, forward: Callable[[], object]) -> list[str]:
    """Return the layers that lack a derivative of the lowest order that any of them lacks."""
    orders = {name: n for name, n in probe_layers(module, forward, _missing_order).items() if n}
    lowest = min(orders.values(), default=0)
    return innermost([name for name, order in orders.items() if order == lowest])


def innermost(names: Sequence[str]) -> list[str]:
    """Return the probed layers of which no part is named too."""
    paths = [name.split(" ")[0] for name in names]
    return [
        name
        for name, path in zip(names, paths, strict=True)
        if not any(p.startswith(f"{path}.") or (path == "itself" != p) for p in paths)
    ]


def probe_layers(
    module: nn.Module,
    forward: Callable[[], object],
    probe: Callable[[Callable[..., Any], list[Tensor], list[Tensor]], T],
) -> dict[str, T]:
    """Call ``probe`` on every layer that ``forward`` runs, with what it runs on.

    ``probe`` gets the layer, its floating-point inputs (detached, requiring gradients) and its
    parameters; results come by the layer's name and type.
    """
    results: dict[str, T] = {}
    busy = False

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            nonlocal busy
            if busy or name in results:
                return
            busy = True
            try:
                with torch.enable_grad():
                    fresh, named = map_tensors(_leaf, (args, kwargs))
                    inputs = [t for t in tensors((fresh, named)) if t.requires_grad]
                    parameters: list[Tensor] = [p for p in layer.parameters() if p.requires_grad]

                    def run() -> Any:  # on copies, which a layer may change in place
                        copies, named_copies = map_tensors(Tensor.clone, (fresh, named))
                        return layer(*copies, **named_copies)

                    results[name] = probe(run, inputs, parameters)
            finally:
                busy = False

        return hook

    handles = [
        layer.register_forward_hook(
            hook_of(f"{name or 'itself'} ({type(layer).__name__})"), with_kwargs=True
        )
        for name, layer in module.named_modules()
        if "parametrizations" not in name.split(".")
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return results


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _missing_order(layer: Callable[[], Any], inputs: list[Tensor], parameters: list[Tensor]) -> int:
    """Return 2 or 3 where a layer lacks that derivative, 0 where it has both."""
    points = inputs + parameters
    values = [t for t in tensors(layer()) if t.requires_grad]
    for order in (1, 2, 3):
        if not values:
            break
        loss = torch.stack([t.square().sum() for t in values]).sum()
        try:
            found = torch.autograd.grad(loss, points, create_graph=True, allow_unused=True)
        except RuntimeError:
            return order
        values = [g for g in found if g is not None and g.requires_grad]
        if order < 3 and _has_dead_ends(graph(values)):
            return order + 1
    return 0


def graph(outputs: Iterable[Tensor], until: Iterable[Node] = ()) -> set[Node]:
    """Return the autograd nodes behind the outputs, up to and with those of ``until``."""
    last = set(until)
    stack = [output.grad_fn for output in outputs]
    nodes: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            if node in last:
                continue
            stack.extend(following for following, _ in node.next_functions)
    return nodes


def _has_dead_ends(nodes: set[Node]) -> bool:
    """Return whether there are missing derivatives, which ``autograd.grad`` may pass by."""
    missing = {"torch::autograd::NotImplemented", "torch::autograd::Error"}
    return any(node.name() in missing for node in nodes)


@contextmanager
def calls_to_the_module_itself(module: nn.Module) -> Iterator[list[bool]]:
    """Record forward calls of a module that do not run on parameters of the look-ahead."""
    own = {id(p) for p in module.parameters()}
    found: list[bool] = []

    def hook(module: nn.Module, _: Any) -> None:
        if any(id(p) in own for p in module.parameters()):
            found.append(True)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
