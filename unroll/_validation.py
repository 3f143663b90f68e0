"""What the look-ahead accepts: discriminators, objectives, K, minibatches, losses, projections."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.utils.rnn import PackedSequence

from unroll._functional import Batch, Pair, tensors
from unroll._penalties import summands
from unroll._supported import checked_discriminator, overlap

F = TypeVar("F", bound=Callable[..., Any])
# What project= and transform_gradients= are: functions from named tensors to named tensors.
Mapped = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def outside_compiled_code(method: F) -> F:
    """Let a method run as Python inside what ``torch.compile`` traces, its own steps included."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the decorator itself imports the compiler: seconds
            disable: Any = torch.compiler.disable
            return disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return cast(F, run)


def checked_arguments(
    discriminator: object, objective: Any, transform_gradients: object, project: object
) -> tuple[nn.Module, list[Any]]:
    """Return the module inside all wrappers, and what a look-ahead has to preserve with it."""
    module, objectives = checked_discriminator(discriminator), summands(objective)
    for part in objectives:
        names = "discriminator_loss", "generator_loss"
        methods = [getattr(part, name, None) for name in names]
        if isinstance(part, type) or not all(map(callable, methods)):
            raise TypeError(
                "objective: must be an object with the methods discriminator_loss and "
                f"generator_loss; got {part!r}. Pass for instance unroll.Minimax(), or wrap "
                "a torch loss in unroll.Criterion(...)."
            )
    functions = {"transform_gradients": transform_gradients, "project": project}
    for argument, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(
                f"{argument}: must be a function from a mapping of tensors to one; got "
                f"{type(function).__name__}. Pass for instance a function that clamps each of them."
            )
    return module, [*objectives, transform_gradients, project]


def checked_steps(unroll_steps: object) -> int:
    """Return K, or refuse what is not a count."""
    if isinstance(unroll_steps, bool) or not isinstance(unroll_steps, Integral):  # NumPy's, too
        raise TypeError(
            "unroll_steps: must be an int, the number K of look-ahead steps; got "
            f"{unroll_steps!r} ({type(unroll_steps).__name__}). Use int(...) of a whole number."
        )
    if unroll_steps < 0:
        raise ValueError(
            f"unroll_steps: must be at least 0; got {unroll_steps}. Use 0 for the ordinary loss."
        )
    return int(unroll_steps)


def check_scalar(loss: Tensor, method: str) -> None:
    """Refuse a loss that is not a 0-d tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"objective: {method} must return a 0-d tensor; got {type(loss).__name__}. Return the "
            "loss as torch computed it."
        )
    if loss.dim() != 0:
        raise ValueError(
            f"objective: {method} must return a 0-d tensor; got shape {tuple(loss.shape)}. Reduce "
            "it with .mean()."
        )


def drawn(
    batch: Pair, minibatches: Iterable[Pair] | None, steps: int, *, differentiable: bool
) -> list[Pair]:
    """Return what each step sees; refuse fakes without a path to G where ``differentiable``."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "UnrolledGeneratorLoss: the look-ahead differentiates and so cannot run in "
            "torch.inference_mode(). Use torch.no_grad() for a value without a graph."
        )
    _check_pair(batch, "", differentiable)
    if minibatches is None:
        return [batch] * steps
    pairs = drawn_minibatches(minibatches, steps)
    for k, pair in enumerate(pairs):
        _check_pair(pair, f"minibatches, item {k}, ", differentiable)
    return pairs


def assignable(name: str, value: object) -> object:
    """Return what may be assigned to a loss, K or what tools keep on a module; refuse the rest."""
    if name == "unroll_steps":
        return checked_steps(value)
    if not (name.startswith("_") or name == "training"):
        raise AttributeError(
            f"{name}: cannot be assigned, of a loss only unroll_steps can; got {value!r}. Make a "
            "new UnrolledGeneratorLoss, which costs nothing, or check the spelling."
        )
    return value


def drawn_minibatches(minibatches: Iterable[Pair], steps: int) -> list[Pair]:
    """Return exactly ``steps`` (fake_k, real_k) pairs, and draw no more."""
    if not isinstance(minibatches, Iterable):
        raise TypeError(
            "minibatches: must be an iterable of (fake, real) pairs; got "
            f"{type(minibatches).__name__}. Pass for instance a list of {steps} pairs."
        )
    pairs, versions = list[Pair](), list[list[int]]()
    for k, pair in enumerate(islice(minibatches, steps)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                "minibatches: must yield (fake, real) pairs; item "
                f"{k} is a {type(pair).__name__}. Yield (generator(z), real)."
            )
        pairs.append((pair[0], pair[1]))
        versions.append([t._version for t in tensors(pairs[-1])])
    for k, (pair, version) in enumerate(zip(pairs, versions, strict=True)):
        moved = [t for t, v in zip(tensors(pair), version, strict=True) if t._version != v]
        if any(overlap(t, later) for t in moved for later in tensors(pairs[k + 1 :])):
            raise ValueError(
                "minibatches: must yield tensors of their own, since all pairs are drawn before "
                f"the first step; item {k} was changed while later ones were drawn. Yield clones "
                "of a buffer that is filled again."
            )
    if len(pairs) < steps:
        raise ValueError(
            f"minibatches: must hold one (fake, real) pair for each of the {steps} look-ahead "
            f"steps; only {len(pairs)} came. Pass {steps} pairs or set unroll_steps={len(pairs)}."
        )
    return pairs


def _check_pair(pair: Pair, where: str, differentiable: bool) -> None:
    """Refuse what is no batch, and fakes without a path to a generator."""
    for name, batch in zip(("fake", "real"), pair, strict=True):
        _check_batch(batch, where + name)
    fakes = tensors(pair[0])
    if any(map(is_functorch_wrapped_tensor, fakes)):
        raise TypeError(
            f"{where}fake: must be ordinary tensors; got those of a torch.func transform, in which "
            "no optimizer can be looked ahead of. Call the loss outside of torch.func and "
            "differentiate it with backward() or torch.autograd.grad."
        )
    if not differentiable or any(t.requires_grad for t in fakes):
        return
    rule = f"{where}fake: must carry the generator's graph, through which both terms of Eq. 12 flow"
    if any(t.is_inference() for t in fakes):
        raise ValueError(
            f"{rule}; it was made in torch.inference_mode(). Run the generator outside of it."
        )
    if fakes and not any(t.is_floating_point() or t.is_complex() for t in fakes):
        kinds = ", ".join(sorted({str(t.dtype) for t in fakes}))
        raise ValueError(
            f"{rule}; its tensors are of {kinds}, which has no gradient. Pass what the generator "
            "computes before it samples or rounds: probabilities, or F.gumbel_softmax(...)."
        )
    if any(t.requires_grad for t in tensors(pair[1])):
        raise ValueError(
            f"{rule}; no tensor in it requires a gradient, but one in real does. Are they swapped? "
            "Call loss(fake, real)."
        )
    raise ValueError(
        f"{rule}; no tensor in it requires a gradient. Pass generator(z), not z, and do not detach "
        "it or make it under torch.no_grad(). To evaluate only, call the loss under "
        "torch.no_grad(); for the first term alone, set stop_gradient=True."
    )


def _check_batch(batch: Batch, name: str) -> None:
    """Refuse a batch that D would get in another way than it seems."""
    rule = f"{name}: must be a tensor for D(x), a tuple for D(*x) or a mapping for D(**x); got"
    if isinstance(batch, PackedSequence):
        raise TypeError(
            f"{rule} a PackedSequence, which is a tuple, too. Pass it as the one argument that it "
            "is, (packed,)."
        )
    if isinstance(batch, list):
        raise TypeError(
            f"{rule} a list. Pass tuple(batch) for what a DataLoader yields, or (batch,) where D "
            "takes a list."
        )
    if not isinstance(batch, (Tensor, tuple, Mapping)):
        raise TypeError(
            f"{rule} {type(batch).__name__}. Pass D's arguments, such as a mapping of the tensors "
            "in it, and let D's forward put them together."
        )


def check_unchanged(pair: Pair, versions: list[int]) -> None:
    """Refuse a D that changes its input in place: the next step would see another batch."""
    if [t._version for t in tensors(pair)] != versions:
        raise ValueError(
            "discriminator: its forward pass (or the objective) must not change its input in "
            "place, as x.sub_(...), x[...] = ... and ReLU(inplace=True) at the start of D do; each "
            "look-ahead step would see another batch than the one before. Write x = x - ..."
        )


def check_gradients_found(gradients: Mapping[str, Tensor]) -> None:
    """Refuse a loss of D that depends on none of the parameters that move."""
    if not gradients:
        raise ValueError(
            "objective: discriminator_loss must depend on the parameters of the discriminator "
            "it is given; its loss depends on none that the optimizer trains. Call the "
            "`discriminator` argument, not a copy of D, and do not detach its output."
        )


def mapped(argument: str, function: Mapped, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a function makes of named tensors, or refuse what cannot be differentiated."""
    # Clones, so that it may write in place, as one of real parameters or gradients does.
    clones = {name: value.clone() for name, value in given.items()}
    # Compiled code has been compared with an eager step.
    watched = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    histories = {name: clone.grad_fn for name, clone in clones.items()} if watched else {}
    found = function(clones)
    if not isinstance(found, Mapping) or found.keys() != given.keys():
        got = list(found) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(
            f"{argument}: must return a mapping with the names that it was given, "
            f"{list(given)}; got {got}. Return all tensors, changed or not."
        )
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{argument}: must return tensors; {name!r} is a {type(value).__name__}. Keep them "
                "as tensors, so that they can be differentiated through."
            )
        if value.shape != given[name].shape:
            raise ValueError(
                f"{argument}: must keep the shapes that it was given; {name!r} came with "
                f"{tuple(given[name].shape)} and left with {tuple(value.shape)}."
            )
        if watched and given[name].requires_grad:
            tracked = value.requires_grad or not bool(value.any())
            if value.grad_fn is histories[name]:  # not changed, or under no_grad or through .data
                tracked = same(value, given[name])
            if not tracked:
                raise ValueError(outside_autograd(argument, name))
    return dict(found)


def outside_autograd(argument: str, name: str) -> str:
    """Return the text of the refusal of a function that leaves no trace in the graph."""
    return (
        f"{argument}: must be differentiable; it changed {name!r} outside autograd (under "
        "torch.no_grad(), through .data, or detached). Use p.clamp(...) and the like, or "
        "unroll.ClipGradNorm for gradients."
    )


def warn(text: str) -> None:
    """Warn where the user called: a warning is shown once for every place."""
    frame, level = sys._getframe(1), 2
    inside = (str(Path(__file__).parent), contextlib.__file__, nn.modules.module.__file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, NaN for NaN."""
    return torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())
