"""What PyTorch's derivatives lack, replaced where that is possible.

Eq. 7 contains a gradient, so differentiating through it takes second derivatives of the
discriminator (third ones under a gradient penalty) and derivatives of the optimizer at points
where the square root has none. The replacements below have the same values, to round-off, and
derivatives of every order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def safe_sqrt(x: Tensor) -> Tensor:
    """Return ``x.sqrt()``, whose derivative is taken as 0 where ``x`` is 0.

    Adam's second moment is exactly zero for a dead ReLU unit (or when ``g * g`` underflows). There
    the slope of the square root is infinite, and ``inf * 0 = nan`` would reach the generator.
    """
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _normalised(input: Tensor, dims: list[int], eps: float) -> Tensor:
    """Return ``input`` with mean 0 and variance 1 over ``dims``, in single precision at least."""
    x = input if input.dtype in (torch.float32, torch.float64) else input.float()
    x = x - x.mean(dims, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)


def _by_channel(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    each = [-1, *[1] * (y.dim() - 2)]
    y = y if weight is None else y * weight.view(each)
    return y if bias is None else y + bias.view(each)


class _NormGradients(torch.autograd.Function):
    """The gradients of a norm as they are, with derivatives of every order.

    PyTorch's own derivative of them must be the last: the next one of a layer norm is wrong, and
    of a batch norm, too, up to torch 2.13; then it is refused. Where a graph is asked for,
    composite operations take its place.
    """

    @staticmethod
    def forward(ctx: Any, norm: Callable[..., Tensor], *given: Any) -> Any:
        ctx.norm = norm
        ctx.save_for_backward(*given[:3])  # what the gradients are functions of
        ctx.set_materialize_grads(False)
        return given[3:]

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor | None) -> Any:
        if not torch.is_grad_enabled() or all(v is None for v in wanted):
            return None, None, None, None, *wanted
        gradient, x, weight = (
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in ctx.saved_tensors
        )
        points = x, weight, torch.zeros_like(weight, requires_grad=True)
        y = ctx.norm(*points).to(gradient)
        found = torch.autograd.grad(y, points, gradient, create_graph=True)
        pairs = [(g, v) for g, v in zip(found, wanted, strict=True) if v is not None]
        outputs, seeds = zip(*pairs, strict=True)
        inputs = gradient, x, weight
        again = torch.autograd.grad(outputs, inputs, seeds, create_graph=True, allow_unused=True)
        return None, *again, *(None,) * len(wanted)


def _differentiable(
    norm_of: Callable[[Any], Callable[..., Tensor]],
    found: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
) -> Any:
    """Replace the gradients that a norm's node has found, as a hook of it."""
    nodes = [g.grad_fn for g in found if g is not None and g.grad_fn is not None]
    if not nodes or not torch.is_grad_enabled():
        return None
    node: Any = nodes[0]  # their derivative, the same for all of them
    if node.name().startswith("_NormGradients"):  # a D within a D: it has been replaced
        return None
    x, weight = node._saved_input, node._saved_weight
    weight = x.new_ones(1) if weight is None else weight
    return _NormGradients.apply(norm_of(node), gradients[0], x, weight, *found)


def _norm(
    function: Callable[..., Any], order: str, norm_of: Callable[..., Callable[..., Tensor]]
) -> Callable[..., Any]:
    """Let a norm have derivatives of every order, and be PyTorch's otherwise.

    ``norm_of`` makes it a function of input, weight and bias in elementary operations, out of the
    arguments, which have the names in ``order``, and a node of the derivative.
    """
    names = order.split()

    def norm(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        y, *others = output if isinstance(output, tuple) else (output,)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        # No hook reaches graphs that a transform of torch.func or the compiler differentiates.
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            affine = given.get("weight"), given.get("bias")
            y = norm_of(given)(given["input"], *affine).to(y.dtype)
            return (y, *others) if others else y
        if y.grad_fn is not None:
            node = y.grad_fn
            if "Norm" not in node.name():  # the view behind an instance norm
                node = node.next_functions[0][0]
            node.register_hook(partial(_differentiable, partial(norm_of, given)))
        return output

    return norm


def _layer_norm(given: Any, _: Any = None) -> Callable[..., Tensor]:
    dims, eps = [*range(-len(given["normalized_shape"]), 0)], given.get("eps", 1e-5)

    def norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = _normalised(input, dims, eps)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return norm


def _batch_norm(given: Any, node: Any = None, *, first: int = 0) -> Callable[..., Tensor]:
    """Use the statistics given, or those over all dimensions from ``first`` on but channels."""
    eps = given.get("eps", 1e-5)
    statistics: list[Tensor] = []
    if not given.get("use_input_stats", given.get("training", first == 2)):
        names = ["running_mean", "running_var"]  # the node's complain if they have changed
        statistics = [getattr(node, f"_saved_{n}") if node is not None else given[n] for n in names]

    def norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if statistics:
            mean, variance = (t.view(-1, *[1] * (input.dim() - 2)) for t in statistics)
            y = (input - mean) * torch.rsqrt(variance + eps)
        else:
            y = _normalised(input, [d for d in range(first, input.dim()) if d != 1], eps)
        return _by_channel(y, weight, bias)

    return norm


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """In compiled code, PyTorch's derivatives hold for one length of the batch only."""
    output = F.group_norm(input, num_groups, weight, bias, eps)
    if not torch.compiler.is_compiling():
        return output
    y = _normalised(input.reshape(len(input), num_groups, -1), [2], eps).view_as(input)
    return _by_channel(y, weight, bias).to(output.dtype)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """PyTorch's double backward holds the norm of ``v`` constant."""
    kept = dim if dim == -1 else dim % v.dim()  # -1 means one norm over all of v
    dims = [d for d in range(v.dim()) if d != kept]
    return v * (g / v.square().sum(dims, keepdim=True).sqrt())


def _within(
    context: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:  # torch 2.7 cannot trace a context as a decorator
        with context():
            return function(*args, **kwargs)

    return run


_instance_norm = partial(_batch_norm, first=2)
# Fused attention has no second derivative; PyTorch's ``MATH`` backend has. CuDNN's recurrent layers
# have none; PyTorch's own have.
_in_plain_operations = partial(_within, partial(sdpa_kernel, SDPBackend.MATH))
_without_cudnn = partial(_within, partial(torch.backends.cudnn.flags, enabled=False))
_LAYER = "input normalized_shape weight bias eps"
_TORCHS = "input weight bias running_mean running_var {} momentum eps"
_FUNCTIONAL = "input running_mean running_var weight bias {} momentum eps"
_NORMS: dict[Callable[..., Any], tuple[str, Callable[..., Callable[..., Tensor]]]] = {
    F.layer_norm: (_LAYER, _layer_norm),
    torch.layer_norm: (_LAYER, _layer_norm),
    torch.native_layer_norm: (_LAYER, _layer_norm),
    F.batch_norm: (_FUNCTIONAL.format("training"), _batch_norm),
    torch.batch_norm: (_TORCHS.format("training"), _batch_norm),
    torch.native_batch_norm: (_TORCHS.format("training"), _batch_norm),
    F.instance_norm: (_FUNCTIONAL.format("use_input_stats"), _instance_norm),
    torch.instance_norm: (_TORCHS.format("use_input_stats"), _instance_norm),
}
_TWICE: dict[Callable[..., Any], Callable[..., Any]] = {
    **{function: _norm(function, *how) for function, how in _NORMS.items()},
    F.group_norm: _group_norm,
    torch._weight_norm: weight_norm,
    F.scaled_dot_product_attention: _in_plain_operations(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _in_plain_operations(F.multi_head_attention_forward),
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


# The context of a forward pass of D that will be differentiated twice or more.
right_derivatives = partial(_Replacing, _TWICE)


def differentiable_roots(*, adagrad: bool) -> TorchFunctionMode:
    """Return a context in which an optimizer has its right slope at a zero second moment."""
    return _Replacing(_ROOT | {torch.where: _adagrad_where} if adagrad else _ROOT)


RECOMPUTATION = (
    "discriminator: activation checkpointing inside D (and what else hooks saved tensors there, "
    "such as save_on_cpu) recomputes with D's real parameters, which gives a wrong gradient "
    "through the look-ahead. Switch torch.utils.checkpoint off in D while the generator's loss is "
    "computed; checkpoint=True of the loss saves the same memory."
)


@contextmanager
def recomputation_refused() -> Iterator[None]:
    """Refuse activation checkpointing: its second run would not find theta_D^k in D."""
    with ExitStack() as stack:
        # Torch refuses to switch hooks off within those of the user, around the call: these are
        # right, and what D does under them is not seen.
        with suppress(RuntimeError):
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTATION))
        yield


@contextmanager
def stance(name: Literal["default", "force_eager"]) -> Iterator[None]:
    """Set the stance of ``torch.compile`` for a while, and give back what that takes of None.

    In torch 2.7 it takes three references, and Python before 3.12 dies where none is left.
    """
    try:
        with torch.compiler.set_stance(name):
            yield
    finally:
        for _ in range(3):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(None))


def inner_gradients(
    loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of D's loss, None where it does not depend on a parameter."""
    try:
        return torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error):  # the form of checkpointing that hooks no tensors
            raise RuntimeError(RECOMPUTATION) from error
        raise
