"""A step and its adjoint as Inductor compiles them; what of torch is private stands here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

FEW = 4  # terms or columns of a matrix product that are worth writing out
_TERMS = {  # names in what is traced, and what the user calls it
    "played.objective": "objective",
    "played.module": "discriminator",
    "settings[": "optimizer.param_groups[",
    "pair[0]": "fake",
    "pair[1]": "real",
    "carried[0]": "discriminator.parameters",
    "carried[1]": "discriminator.buffers",
    "carried[2]": "optimizer.state",
}
# tanh(z) / z = 1 + z^2 p(z^2) / q(z^2), of least relative error up to z = 4.52.
TANH_NUMERATOR = (-0.333332368, -0.015369781, -3.96417718e-06)
TANH_DENOMINATOR = (1.0, 0.446099413, 0.0165571174)
# Random numbers are those of the eager step; convolutions keep their layout, which saves half of
# the kernels and of the time to compile them.
SETTINGS = {"fallback_random": True, "layout_optimization": False}


class CompiledStep(NamedTuple):
    """A step as two functions of flat lists."""

    forward: Callable[[list[Any]], Sequence[Any]]  # of inputs; outputs, then what is saved
    adjoint: Callable[[list[Any]], Sequence[Any]]  # of what is saved, then a tangent per output
    differentiable: tuple[bool, ...]  # outputs that have tangents


def generated(graph: Any, inputs: Sequence[Any], *, is_backward: bool) -> Any:
    """Return code for a graph: a function of a list, which it empties."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(graph, inputs, is_backward=is_backward)


def compiled_step(graph: Any, inputs: Sequence[Any]) -> CompiledStep:
    """Return what Dynamo has captured as compiled code, with its adjoint where that is needed."""
    from torch._functorch import config as functorch
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext, detect_fake_mode
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.passes._tensorify_python_scalars import tensorify_python_scalars

    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    with torch.enable_grad():
        examples = [node.meta["example_value"] for node in output.args[0]]
    train = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in inputs
    )
    differentiable = tuple(train and t.requires_grad for t in examples)

    def fresh(*given: Any) -> tuple[Tensor, ...]:
        # No views of each other or of inputs, and in the layout that tangents are expected in.
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in graph(*given))

    twice = torch.ops.aten._convolution_double_backward.default
    with config.patch(SETTINGS), _traced_as(twice, convolution_twice), compiling_meanwhile():
        table: Any = {**select_decomp_table(), **DECOMPOSITIONS}
        joint: Any = aot_export_joint_simple(
            fresh, tuple(inputs), trace_joint=train, decompositions=table
        )
        for node in joint.graph.nodes:  # of torch 2.7, whose partitioner cannot take them
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                joint.graph.erase_node(node)
        count = len(inputs)
        mode = detect_fake_mode()
        if mode is not None and mode.shape_env is not None:
            tensorify_python_scalars(joint, mode.shape_env, mode)  # numbers that vary
        places = _placeholders(joint)
        if not train:
            code = generated(joint, [node.meta["val"] for node in places], is_backward=False)
            return CompiledStep(code, _no_adjoint, differentiable)
        assert len(places) == count + sum(differentiable)
        values = [node.meta["val"] for node in places]
        names = {node.name: i for i, node in enumerate(places[:count])}
        # Memory is slower than arithmetic; but random numbers must not be drawn again.
        tags = [getattr(node.target, "tags", ()) for node in joint.graph.nodes]
        draws = any(torch.Tag.nondeterministic_seeded in found for found in tags)
        with functorch.patch(aggressive_recomputation=not draws):
            forward, backward = min_cut_rematerialization_partition(
                joint, (values[:count], values[count:]), num_fwd_outputs=len(examples)
            )
        used = [names[node.name] for node in _placeholders(forward)]
        (end,) = (node for node in forward.graph.nodes if node.op == "output")
        end.meta["user_visible_output_idxs"] = list(range(len(examples)))
        # The adjoint gets what is saved, then tangents.
        needs, saved = _placeholders(backward), end.args[0][len(examples) :]
        kept = {node.name: i for i, node in enumerate([*saved, *places[count:]])}
        order = [kept[node.name] for node in needs]
        context: Any = TracingContext.get()
        context.fakify_first_call = True  # strides are symbols where sizes are
        with context.report_output_strides() as strides:
            run = generated(
                forward, [n.meta["val"] for n in _placeholders(forward)], is_backward=False
            )
        given = [n.meta["val"] for n in needs]
        for i, place in enumerate(order):
            stride = strides[len(examples) + place] if strides and place < len(saved) else None
            if stride is not None and _hints(given[i].stride()) != _hints(stride):
                given[i] = given[i].as_strided(given[i].shape, stride)
        run_backward = generated(backward, given, is_backward=True)
    return CompiledStep(
        lambda inputs: run([inputs[i] for i in used]),
        lambda inputs: run_backward([inputs[i] for i in order]),
        differentiable,
    )


def cause(error: Exception, code: Any) -> str:
    """Return why code was not compiled, in terms of what the user has passed."""
    text, _, place = " ".join(str(error).split()).partition(" from user code: ")
    if isinstance(error.__context__, type(error)):  # Dynamo's, of the innermost frame
        text = " ".join(str(error.__context__).split())
    failures = getattr(torch._dynamo.utils, "guard_failures", {}).get(code)
    if "RecompileLimit" in type(error).__name__ and failures:
        text = "this changes from call to call: " + failures[-1].partition("#")[0]
    reason = text.partition(" Explanation: ")[0][:200]
    at = f" (at {place.partition(' Set TORCH')[0][-200:]})" if place else ""
    said = f"{type(error).__name__}: {reason}{at}"
    for mine, theirs in _TERMS.items():
        said = said.replace(mine, theirs)
    return said


def _placeholders(graph: Any) -> list[Any]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _hints(sizes: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(s.node.hint if isinstance(s, torch.SymInt) else s for s in sizes)


def _no_adjoint(_: Sequence[Any]) -> Sequence[Any]:
    raise AssertionError("nothing here has a derivative")


@contextmanager
def _traced_as(operation: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let a composite operation of torch be one in Python, wherever it is traced."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    operation.py_kernels[key] = function
    operation._dispatch_cache.clear()
    try:
        yield
    finally:
        del operation.py_kernels[key]
        operation._dispatch_cache.clear()


@contextmanager
def compiling_meanwhile() -> Iterator[None]:
    """Let the C++ compiler work while Python does, which saves a fifth of the first call.

    It is tried out for seconds, and compiles one graph while code for the next is generated.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    compiler: Any = AsyncCompile
    wait, thread, begun = compiler.wait, get_ident(), list[tuple[Any, Any]]()

    def later(self: Any, scope: Any) -> None:
        if get_ident() == thread:
            begun.append((self, scope))
        else:
            wait(self, scope)

    with ThreadPoolExecutor(1) as beside:
        beside.submit(pick_vec_isa)
        compiler.wait = later
        try:
            yield
        finally:
            compiler.wait = wait
            for given in begun:
                wait(*given)


def convolution_twice(
    input_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    gradient: Tensor,
    weight: Tensor,
    input: Tensor,
    *how: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return what PyTorch's double backward of a convolution does, for any length of a batch.

    PyTorch's own reads the sizes, so that the code would serve one length alone.
    """
    aten, how = torch.ops.aten, how[:-1]  # the last one says what is wanted
    parts, of_input, of_weight = list[Tensor](), None, None
    if input_tangent is not None:
        parts.append(aten.convolution(input_tangent, weight, None, *how))
        found = gradient, input_tangent, weight, None, *how, (False, True, False)
        of_weight = aten.convolution_backward(*found)[1]
    if weight_tangent is not None:
        parts.append(aten.convolution(input, weight_tangent, None, *how))
        found = gradient, input, weight_tangent, None, *how, (True, False, False)
        of_input = aten.convolution_backward(*found)[0]
    if bias_tangent is not None:
        parts.append(bias_tangent.view(-1, *[1] * (gradient.dim() - 2)).expand_as(gradient))
    return reduce(torch.add, parts) if parts else None, of_input, of_weight


def product(a: Tensor, b: Tensor) -> Any:
    """Return ``a @ b``, of batches too, in operations that fuse with others, where BLAS is slow.

    The first layer of a D on points, the last one of any D, and their derivatives are products with
    a dimension of one or two, for which BLAS takes as long as for one of eight. Sums run over the
    long side, along rows, and the vectors of the processor along columns.
    """
    (rows, inner), columns = a.shape[-2:], b.shape[-1]
    exact = a.dtype in (torch.float32, torch.float64)  # others are added up in higher precision
    # Comparisons of a batch's length with anything but a constant would hold for that length alone.
    if a.device.type != "cpu" or not exact or rows == 0 or inner == 0 or columns == 0:
        return NotImplemented
    if inner <= FEW:
        b = _in_rows(b)
        parts = (a[..., i : i + 1] * b[..., i : i + 1, :] for i in range(inner))
        return reduce(torch.add, parts)
    if columns == 1:
        return (a * b.mT).sum(-1, keepdim=True)
    if rows <= FEW:
        return torch.stack([(a[..., i, :, None] * b).sum(-2) for i in range(rows)], -2)
    if columns <= FEW:
        of_b = _in_rows(b.mT)
        return torch.stack([(a.mT * of_b[..., i, :, None]).sum(-2) for i in range(columns)], -1)
    return NotImplemented


def _in_rows(matrix: Tensor) -> Tensor:
    """Return a matrix whose rows lie in memory, a small copy that saves a third of a loop's time.

    Loops along rows that are read with a stride, as the weights of a transposed layer are, do not
    vectorise; and Inductor would move an ordinary copy into the loop.
    """
    stride = matrix.contiguous().stride()
    return torch.ops.prims.inductor_force_stride_order(matrix, stride)  # type: ignore[no-any-return]


def product_and_bias(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    """Return ``bias + a @ b`` in the same way."""
    found = product(a, b) if beta == 1 and alpha == 1 else NotImplemented
    return found if found is NotImplemented else bias + found


def tanh(x: Tensor) -> Any:
    """Return ``x.tanh()`` in operations that vectorise and fuse; Sleef's takes four times as long.

    With t = tanh(x / 2) as a rational function of least relative error, tanh(x) = 2 t / (1 + t^2),
    which is insensitive to t where t is near 1. At most 4 units in the last place are off.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return NotImplemented
    half = (0.5 * x).clamp(-4.52, 4.52)  # beyond, the result is 1 in float32
    square = half * half
    numerator = _polynomial(square, TANH_NUMERATOR)
    denominator = _polynomial(square, TANH_DENOMINATOR)
    t = half + half * (square * numerator / denominator)
    return ((t + t) / (1 + t * t)).clamp(-1, 1)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    *lower, highest = coefficients
    return reduce(lambda sum_, c: sum_ * x + c, reversed(lower), torch.full_like(x, highest))


DECOMPOSITIONS = {
    torch.ops.aten.mm.default: product,
    torch.ops.aten.bmm.default: product,
    torch.ops.aten.addmm.default: product_and_bias,
    torch.ops.aten.baddbmm.default: product_and_bias,
    torch.ops.aten.tanh.default: tanh,
}
