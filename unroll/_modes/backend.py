"""A step and its adjoint as Inductor compiles them; what of torch is private stands here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unroll._modes.decompositions import COMPOSED, DECOMPOSITIONS

_TERMS = {  # names in what is traced, and what the user calls it
    "game.objective": "objective",
    "game.discriminator.module": "discriminator",
    "settings[": "optimizer.param_groups[",
    "pair[0]": "fake",
    "pair[1]": "real",
    "carried[0]": "discriminator.parameters",
    "carried[1]": "discriminator.buffers",
    "carried[2]": "optimizer.state",
}
_DIFFERENTIATING = "torch.autograd.grad", "torch/autograd/__init__.py", "requires_grad_"
_LINE = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_NOT_THEIRS = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
# Random numbers are those of the eager step; convolutions keep their layout, which saves half of
# the kernels and of the time to compile them.
SETTINGS = {"fallback_random": True, "layout_optimization": False}


class CompiledStep(NamedTuple):
    """A step as two functions of flat lists."""

    forward: Callable[[list[Any]], Sequence[Any]]  # of inputs; outputs, then what is saved
    adjoint: Any  # of what is saved, then a tangent per output; none where no input has a gradient
    differentiable: tuple[bool, ...]  # outputs that have tangents


def generated(graph: Any, inputs: Sequence[Any], *, is_backward: bool) -> Any:
    """Return code for a graph: a function of a list, which it empties."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(graph, inputs, is_backward=is_backward)


def compiled_step(graph: Any, inputs: Sequence[Any]) -> CompiledStep:
    """Return what Dynamo has captured as compiled code, with its adjoint where that is needed."""
    import torch._inductor.lowering  # max pooling's decomposition uses it without importing it
    from torch._functorch import config as functorch
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.passes._tensorify_python_scalars import tensorify_python_scalars

    with torch.enable_grad():
        examples = [node.meta["example_value"] for node in _end(graph).args[0]]
    train = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in inputs
    )
    differentiable = tuple(train and t.requires_grad for t in examples)

    def fresh(*given: Any) -> tuple[Tensor, ...]:
        # No views of each other or of inputs, and in the layout that tangents are expected in.
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in graph(*given))

    def code(graph: Any, *, is_backward: bool = False) -> Any:
        end = _end(graph)
        if not is_backward:  # what is not marked, Inductor may lay out anew: also what is saved
            end.meta["user_visible_output_idxs"] = list(range(len(end.args[0])))
        values = [node.meta["val"] for node in _placeholders(graph)]
        return generated(graph, values, is_backward=is_backward)

    with config.patch(SETTINGS), _composed(), compiling_meanwhile():
        table: Any = {**select_decomp_table(), **DECOMPOSITIONS}
        joint: Any = aot_export_joint_simple(
            fresh, tuple(inputs), trace_joint=train, decompositions=table
        )
        mode = detect_fake_mode()
        if mode is not None and mode.shape_env is not None:
            tensorify_python_scalars(joint, mode.shape_env, mode)  # numbers that vary
        if not train:
            return CompiledStep(code(joint), None, differentiable)
        places, count = _placeholders(joint), len(inputs)
        values = [node.meta["val"] for node in places]
        # Memory is slower than arithmetic; but random numbers must not be drawn again.
        tags = [getattr(node.target, "tags", ()) for node in joint.graph.nodes]
        draws = any(torch.Tag.nondeterministic_seeded in found for found in tags)
        with functorch.patch(aggressive_recomputation=not draws):
            forward, backward = min_cut_rematerialization_partition(
                joint, (values[:count], values[count:]), num_fwd_outputs=len(examples)
            )
        # Which inputs the code takes; and the adjoint, of what is saved and then tangents.
        saved = _end(forward).args[0][len(examples) :]
        used = _numbers(places[:count], forward)
        needs = _numbers([*saved, *places[count:]], backward)
        run, run_backward = code(forward), code(backward, is_backward=True)
    return CompiledStep(
        lambda inputs: run([inputs[i] for i in used]),
        lambda inputs: run_backward([inputs[i] for i in needs]),
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
    reason = f"{type(error).__name__}: {text.partition(' Explanation: ')[0][:200]}"
    if any(name in text for name in _DIFFERENTIATING):
        reason = (
            "it cannot follow a gradient that D or the objective takes itself; for a penalty use "
            "unroll.R1, R2 or GradientPenalty, otherwise torch.func.grad"
        )
    lines = [line for line in _LINE.findall(place) if not line[0].startswith(_NOT_THEIRS)]
    said = reason + (" (at {}, line {}, in {})".format(*lines[-1]) if lines else "")
    for mine, theirs in _TERMS.items():
        said = said.replace(mine, theirs)
    return said


def _end(graph: Any) -> Any:
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return output


def _placeholders(graph: Any) -> list[Any]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _numbers(nodes: Sequence[Any], graph: Any) -> list[int]:
    """Return which of the nodes a graph has as its inputs, which keep their names."""
    numbers = {node.name: i for i, node in enumerate(nodes)}
    return [numbers[node.name] for node in _placeholders(graph)]


def out_of_penalty(buffer: Tensor) -> Tensor:
    """Return a buffer that D has renewed within a gradient penalty, as one outside of that.

    The step differentiates once, and the penalty again inside: that is the second level.
    """
    return torch._C._functorch._unwrap_for_grad(buffer, 2)


@contextmanager
def _composed() -> Iterator[None]:
    """Let some composite operations of torch be those in ``COMPOSED``, wherever they are traced."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    for operation, function in COMPOSED.items():
        operation.py_kernels[key] = function
        operation._dispatch_cache.clear()
    try:
        yield
    finally:
        for operation in COMPOSED:
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
