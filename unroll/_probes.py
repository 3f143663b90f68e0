"""What tells which layer of D lacks a derivative, or has a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from unroll._functional import Functional, map_tensors, preserved, tensors
from unroll._objectives import ON_LOGITS

T = TypeVar("T")
_SHAPES = ("View", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Alias")


def without_derivative(module: nn.Module, forward: Callable[[], object]) -> list[str]:
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

    def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal busy
        if busy or name in results:
            return
        busy = True
        try:
            with torch.enable_grad(), preserved(layer):
                pure = Functional(layer)  # calls leave no buffer behind for the next one
                moving = {n: p for n, p in pure.parameters.items() if p.requires_grad}
                fresh = map_tensors(leaf, (args, kwargs))
                inputs = [t for t in tensors(fresh) if t.requires_grad]

                def run() -> Any:  # on copies, which a layer may change in place
                    theta = {n: moving.get(n, p.clone()) for n, p in pure.parameters.items()}
                    copies, named = map_tensors(Tensor.clone, fresh)
                    return pure(lambda _: layer(*copies, **named), theta, pure.buffers)[0]

                results[name] = probe(run, inputs, [*moving.values()])
        finally:
            busy = False

    with ExitStack() as hooks:
        for path, layer in module.named_modules():
            if "parametrizations" not in path.split("."):
                own = partial(hook, f"{path or 'itself'} ({type(layer).__name__})")
                # Before the forward pass: afterwards its input may be overwritten.
                hooks.enter_context(layer.register_forward_pre_hook(own, with_kwargs=True))
        forward()
    return results


def leaf(tensor: Tensor) -> Tensor:
    """Return a copy that a gradient may be asked for."""
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
            with lost_derivatives(graph([loss])) as lost:
                found = torch.autograd.grad(loss, points, create_graph=True, allow_unused=True)
        except RuntimeError:
            return order
        values = [g for g in found if g is not None and g.requires_grad]
        if order < 3 and (lost or has_dead_ends(values)):
            return order + 1
    return 0


def graph(outputs: Iterable[Tensor], until: Iterable[Tensor] = ()) -> set[Node]:
    """Return the autograd nodes behind the outputs, up to and with those of ``until``."""
    last = {tensor.grad_fn for tensor in until}
    stack = [output.grad_fn for output in outputs]
    nodes: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            if node not in last:
                stack.extend(following for following, _ in node.next_functions)
    return nodes


def ends(outputs: Iterable[Tensor], until: Iterable[Tensor]) -> list[Tensor]:
    """Return the leaves that outputs depend on, other than through the tensors in ``until``."""
    variables = (getattr(node, "variable", None) for node in graph(outputs, until))
    return [variable for variable in variables if variable is not None]


def has_dead_ends(outputs: Iterable[Tensor], until: Iterable[Tensor] = ()) -> bool:
    """Return whether there are missing derivatives, which ``autograd.grad`` may pass by."""
    names = (node.name().removeprefix("torch::autograd::") for node in graph(outputs, until))
    return not {"NotImplemented", "WarnNotImplemented", "Error"}.isdisjoint(names)


@contextmanager
def lost_derivatives(nodes: Iterable[Node]) -> Iterator[list[str]]:
    """Record nodes whose backward pass leaves autograd: in NumPy, ``.data`` or a kernel.

    What they return is linear in what they get, so that it must be in the graph, too.
    """
    lost: list[str] = []

    def look(node: Node, returned: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        seeds = [g.requires_grad for g in given if g is not None]
        found = [g for g in returned if g is not None and g.layout == torch.strided]
        if seeds and all(seeds) and not any(g.requires_grad for g in found):
            lost.extend([node.name()] * any(bool(g.any()) for g in found))

    with ExitStack() as hooks:
        for node in nodes:
            hooks.enter_context(node.register_hook(partial(look, node)))
        yield lost


def read_elsewhere(
    discriminator: Functional, moving: Collection[str], loss: Callable[[], Tensor]
) -> str | None:
    """Return a real parameter whose value a loss uses, as a constant perhaps: NaN would reach it.

    Only those that are ``moving`` matter: the others are theta_D^k's, too.
    """
    real = {name: p for name, p in discriminator.parameters.items() if name in moving}

    def reached(names: Iterable[str]) -> bool:
        with ExitStack() as stack:
            for p in map(real.__getitem__, names):
                stack.callback(setattr, p, "data", p.data)
                p.data = torch.full_like(p.data, torch.nan)  # other memory: nobody else reads it
            with suppress(ArithmeticError, AssertionError, RuntimeError, ValueError):
                return bool(loss().isnan())
        return False  # some code refuses NaN

    if not reached(real) or bool(loss().isnan()):
        return None
    return next((name for name in real if reached([name])), None)


@contextmanager
def probabilities(module: nn.Module, objectives: Iterable[object]) -> Iterator[list[str]]:
    """Complain, in a list, of a D that ends in a sigmoid where the objective takes logits."""
    found: list[str] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        node = output.grad_fn if isinstance(output, Tensor) else None
        while node is not None and node.name().startswith(_SHAPES):
            node = node.next_functions[0][0]
        if node is not None and node.name().startswith("SigmoidBackward"):
            found[:] = [
                "discriminator: returns what comes out of a sigmoid, but the objective takes "
                "logits and would apply a second one. Remove the sigmoid, or use "
                "unroll.Criterion(nn.BCELoss())."
            ]

    on_logits = any(isinstance(part, ON_LOGITS) for part in objectives)
    with module.register_forward_hook(look) if on_logits else nullcontext():
        yield found
