"""What PyTorch's derivatives lack: replaced where that is possible, found where it is not.

Eq. 7 contains a gradient, so differentiating through it takes second derivatives of the
discriminator (third ones under a gradient penalty) and derivatives of the optimizer at points
where the square root has none. The replacements below have the same values, to round-off, and
derivatives of every order.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from unroll.stateless import Stateless, map_tensors, tensors

T = TypeVar("T")

DETACHED_FAKES = (
    "objective: discriminator_loss does not depend on the fakes (are they detached?), so the "
    "second term of Eq. 12 is zero. Use `fake` as it is given, or say stop_gradient=True if the "
    "first term alone is meant."
)


def safe_sqrt(x: Tensor) -> Tensor:
    """Return ``x.sqrt()``, whose derivative is taken as 0 where ``x`` is 0.

    Adam's second moment is exactly zero for a dead ReLU unit (or when ``g * g`` underflows). There
    the slope of the square root is infinite, and ``inf * 0 = nan`` would reach the generator.
    """
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Tensor:
    """PyTorch's third derivative, which a gradient penalty needs, is silently wrong."""
    dims = list(range(-len(normalized_shape), 0))
    x = input if input.dtype in (torch.float32, torch.float64) else input.float()
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y if torch.is_autocast_enabled(input.device.type) else y.to(input.dtype)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """PyTorch's double backward holds the norm of ``v`` constant."""
    dims = [d for d in range(v.dim()) if d != dim]  # dim = -1 means one norm over all of v
    return v * (g / v.square().sum(dims, keepdim=True).sqrt())


def _math_attention(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fused attention has no second derivative; PyTorch's ``MATH`` backend has."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return attention


def _without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    """CuDNN's recurrent layers have no second derivative; PyTorch's own have."""

    def recurrent(*args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return function(*args, **kwargs)

    return recurrent


_TWICE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch._weight_norm: _weight_norm,
    F.scaled_dot_product_attention: _math_attention(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _math_attention(F.multi_head_attention_forward),
    **{f: _without_cudnn(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}
_ROOT: dict[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(
    (torch.sqrt, Tensor.sqrt), safe_sqrt
)
_ROOT |= dict.fromkeys((torch.sqrt_, Tensor.sqrt_), lambda x: x.copy_(safe_sqrt(x)))


def _adagrad_where(condition: Tensor, *args: Any) -> Any:
    """Torchopt's Adagrad returns a constant 0 at a zero accumulator, where its step is g / eps."""
    if len(args) == 2 and isinstance(args[1], float) and args[1] == 0.0:
        condition = condition | (args[0] == 0.0)
    return torch.where(condition, *args)


def _power(x: Any, exponent: Any) -> Any:
    if isinstance(x, Tensor) and isinstance(exponent, float) and exponent == 0.5:
        return safe_sqrt(x)
    return torch.pow(x, exponent)


_ROOT |= dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _power)


class _Replacing(TorchFunctionMode):
    def __init__(self, table: dict[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


class _InDiscriminator(_Replacing):
    """Activation checkpointing recomputes D with its real parameters: it is refused."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not Stateless.__call__.__code__:
            if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                raise RuntimeError(
                    "discriminator: activation checkpointing inside D recomputes with D's real "
                    "parameters, which gives a wrong gradient through the look-ahead. Switch "
                    "torch.utils.checkpoint off in D while the generator's loss is computed."
                )
            frame = frame.f_back
        return super().__torch_function__(func, types, args, kwargs)


def discriminator_forward(*, twice: bool) -> TorchFunctionMode:
    """Return the context of D's forward pass; ``twice`` gives it right higher derivatives."""
    return _InDiscriminator(_TWICE if twice else {})


def differentiable_roots(*, adagrad: bool) -> TorchFunctionMode:
    """Return a context in which an optimizer has its right slope at a zero second moment."""
    return _Replacing(_ROOT | {torch.where: _adagrad_where} if adagrad else _ROOT)


def refuse_own_parameters(module: nn.Module, loss: Tensor, until: Iterable[Tensor]) -> None:
    """Refuse a loss that D's real parameters reach; ``until`` are the tensors it may depend on."""
    own = {id(p): name for name, p in module.named_parameters()}
    for node in _graph([loss], [t.grad_fn for t in until if t.grad_fn is not None]):
        name = own.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise RuntimeError(
                f"discriminator, objective: the loss uses D's parameter {name!r} other than "
                "through the discriminator it is given (from a closure, or D keeps it in a plain "
                "list), so the look-ahead cannot put theta_D^k in its place. Call the "
                "`discriminator` argument; in D, read parameters as attributes."
            )


def refuse_other_tensors(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> None:
    """Refuse a step in whose graph stand leaves that a recomputation would not give gradients."""
    ids = {id(t) for t in known}
    for node in _graph(outputs):
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ids:
            raise RuntimeError(
                "checkpoint: the look-ahead uses a tensor that requires a gradient and is no part "
                f"of the batch (shape {tuple(leaf.shape)}; in the objective or in project=), whose "
                "gradient a recomputed step would lose. Pass it in the batch, detach it, or set "
                "checkpoint=False."
            )


def refuse_layers(module: nn.Module) -> None:
    """Refuse layers whose second derivative is wrong in a way that no graph shows."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.SyncBatchNorm) and layer.training:
            raise RuntimeError(
                f"discriminator: {name or 'itself'} (SyncBatchNorm) has no right second derivative "
                "in training mode. Use BatchNorm, whose statistics are those of each rank, or "
                "GroupNorm, or set stop_gradient=True for the first term alone."
            )


def inspect_step(
    module: nn.Module,
    gradients: Mapping[str, Tensor],
    fakes: Sequence[Tensor],
    forward: Callable[[], object],
) -> None:
    """Refuse layers without the derivatives that Eq. 12 needs; warn of detached fakes.

    ``gradients`` are D's at theta_D^0, in the graph of ``fakes``.
    """
    nodes = _graph(gradients.values(), [t.grad_fn for t in fakes if t.grad_fn is not None])
    if _lacks_derivative(nodes):
        orders = probe_layers(module, forward, _missing_order)
        lowest = min((order for order in orders.values() if order), default=0)
        named = [name for name, order in orders.items() if lowest and order == lowest]
        raise RuntimeError(
            "discriminator: the look-ahead needs a derivative that PyTorch does not have, in "
            f"{', '.join(named) or type(module).__name__} (a gradient penalty needs one order "
            "more). Replace the layer (GroupNorm for BatchNorm under a penalty, plain operations "
            "for a fused kernel), or set stop_gradient=True for the first term alone."
        )
    differentiable = [fake for fake in fakes if fake.requires_grad]
    if differentiable and not any(_reaches(nodes, fake) for fake in differentiable):
        warnings.warn(DETACHED_FAKES, stacklevel=2)


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
        def hook(layer: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            nonlocal busy
            if busy or name in results:
                return
            busy = True
            try:
                with torch.enable_grad():
                    fresh = map_tensors(_leaf, args)
                    inputs = [t for t in tensors(fresh) if t.requires_grad]
                    parameters: list[Tensor] = [p for p in layer.parameters() if p.requires_grad]
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


def _missing_order(layer: Callable[[], Any], inputs: list[Tensor], parameters: list[Tensor]) -> int:
    """Return 2 or 3 where a layer lacks that derivative, 0 where it has both."""
    points = inputs + parameters
    values = [t for t in tensors(layer()) if t.requires_grad]
    for order in (2, 3):
        if not values:
            break
        loss = torch.stack([t.square().sum() for t in values]).sum()
        found = torch.autograd.grad(loss, points, create_graph=True, allow_unused=True)
        values = [g for g in found if g is not None and g.requires_grad]
        if _lacks_derivative(_graph(values)):
            return order
    return 0


def _graph(outputs: Iterable[Tensor], until: Iterable[Node] = ()) -> set[Node]:
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


def _lacks_derivative(nodes: set[Node]) -> bool:
    missing = {"torch::autograd::NotImplemented", "torch::autograd::Error"}
    return any(node.name() in missing for node in nodes)


def _reaches(nodes: set[Node], tensor: Tensor) -> bool:
    if tensor.grad_fn is not None:
        return tensor.grad_fn in nodes
    return any(getattr(node, "variable", None) is tensor for node in nodes)
