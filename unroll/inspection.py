"""A look at the first look-ahead step for gradients that would be wrong or missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from unroll.stateless import map_tensors, tensors

T = TypeVar("T")


def inspect_step(
    module: nn.Module,
    gradients: Iterable[Tensor],
    fakes: Sequence[Tensor],
    forward: Callable[[], object],
) -> None:
    """Refuse layers without the derivatives that Eq. 12 needs; warn of detached fakes.

    ``gradients`` are D's at theta_D^0, in the graph of ``fakes``.
    """
    nodes = _graph(gradients)
    if _lacks_derivative(nodes):
        layers = probe_layers(module, forward, _lacks_second_derivative)
        named = [name for name, lacks in layers.items() if lacks]
        named = named or [type(module).__name__]
        raise RuntimeError(
            f"discriminator: the look-ahead needs a derivative that PyTorch does not have, in "
            f"{', '.join(named)} (a gradient penalty needs one order more). Replace the layer "
            "(GroupNorm for BatchNorm under a penalty, plain operations for a fused kernel), or "
            "set stop_gradient=True for the first term alone."
        )
    if not any(_reaches(nodes, fake) for fake in fakes):
        warnings.warn(
            "objective: discriminator_loss does not depend on the fakes (are they detached?), so "
            "the second term of Eq. 12 is zero. Use `fake` as it is given, or say "
            "stop_gradient=True if the first term alone is meant.",
            stacklevel=2,
        )


def probe_layers(
    module: nn.Module,
    forward: Callable[[], object],
    probe: Callable[[Callable[..., Any], list[Tensor], list[Tensor]], T],
) -> dict[str, T]:
    """Call ``probe`` on every innermost layer that ``forward`` runs, with what it runs on.

    ``probe`` gets the layer, its floating-point inputs (detached, requiring gradients) and its
    parameters; results come by the layer's name and type.
    """
    results: dict[str, T] = {}
    busy = False

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal busy
            if busy or name in results:
                return
            busy = True
            try:
                with torch.enable_grad():
                    fresh = map_tensors(_leaf, args)
                    inputs = [t for t in tensors(fresh) if t.requires_grad]
                    parameters = [p for p in layer.parameters() if p.requires_grad]
                    results[name] = probe(lambda: layer(*fresh), inputs, parameters)
            finally:
                busy = False

        return hook

    handles = [
        layer.register_forward_hook(hook_of(f"{name or 'itself'} ({type(layer).__name__})"))
        for name, layer in module.named_modules()
        if not {child for child, _ in layer.named_children()} - {"parametrizations"}
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return results


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _lacks_second_derivative(
    layer: Callable[[], Any], inputs: list[Tensor], parameters: list[Tensor]
) -> bool:
    points = inputs + parameters
    outputs = [t for t in tensors(layer()) if t.requires_grad]
    if not outputs:
        return False
    loss = torch.stack([t.square().sum() for t in outputs]).sum()
    gradients = torch.autograd.grad(loss, points, create_graph=True, allow_unused=True)
    return _lacks_derivative(_graph(g for g in gradients if g is not None))


def _graph(outputs: Iterable[Tensor]) -> set[Node]:
    stack = [output.grad_fn for output in outputs]
    nodes: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return nodes


def _lacks_derivative(nodes: set[Node]) -> bool:
    missing = {"torch::autograd::NotImplemented", "torch::autograd::Error"}
    return any(node.name() in missing for node in nodes)


def _reaches(nodes: set[Node], tensor: Tensor) -> bool:
    if tensor.grad_fn is not None:
        return tensor.grad_fn in nodes
    return any(getattr(node, "variable", None) is tensor for node in nodes)
