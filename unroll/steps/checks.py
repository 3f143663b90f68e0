"""What the look-ahead accepts: discriminators, K, minibatches, losses, projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from unroll.stateless import Batch, tensors, unwrap_once

Project = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def checked_discriminator(discriminator: object) -> nn.Module:
    """Return the user's own module inside all wrappers, or refuse it."""
    if not isinstance(discriminator, nn.Module):
        raise TypeError(
            "discriminator: must be an nn.Module; got "
            f"{type(discriminator).__name__}. Pass the module whose parameters are trained."
        )
    module, inner = discriminator, unwrap_once(discriminator)
    while inner is not None:
        module, inner = inner, unwrap_once(inner)
    _check_supported(module)
    return module


def _check_supported(module: nn.Module) -> None:
    """Refuse modules that cannot be run with parameters other than their own."""
    for name, submodule in module.named_modules():
        if isinstance(submodule, torch.jit.ScriptModule):
            raise TypeError(
                f"discriminator: a torch.jit module ({name or 'the discriminator itself'}) cannot "
                "run with parameters other than its own. Pass the nn.Module it was made from."
            )
        if type(submodule).__module__.startswith(("torch.ao.nn", "torch.nn.quantized")):
            raise TypeError(
                f"discriminator: {name or 'the discriminator itself'} is quantised, and rounding "
                "has no derivative. Pass the floating-point module from before the quantisation."
            )
        if any(c.__module__.startswith("torch.distributed.fsdp") for c in type(submodule).__mro__):
            raise TypeError(
                f"discriminator: {name or 'the discriminator itself'} is sharded by FSDP, whose "
                "gathering hooks have no second derivative. Wrap D in DistributedDataParallel."
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, (UninitializedParameter, UninitializedBuffer)):
            raise ValueError(
                f"discriminator: parameter {name!r} is not initialised yet (a lazy module). Run "
                "one batch through the discriminator before wrapping it."
            )
        if parameter.is_complex():
            raise TypeError(
                f"discriminator: parameter {name!r} is complex, which the look-ahead does not "
                "support. Store its real and imaginary parts."
            )
    _refuse_shared_memory(module)
    if next(module.parameters(), None) is None:
        raise ValueError(
            f"discriminator: must have parameters to look ahead with; {type(module).__name__} has "
            "none. Pass the module whose parameters the optimizer trains."
        )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one storage have elements in common."""
    starts, ends = [], []
    for t in (one, other):
        starts.append(t.storage_offset())
        steps = zip(t.shape, t.stride(), strict=True)
        ends.append(starts[-1] + 1 + sum((size - 1) * stride for size, stride in steps))
    if max(starts) >= min(ends):  # neighbours, as the weights of a flattened LSTM are
        return False
    places = torch.arange(max(ends))
    own, others = (
        places.as_strided(t.shape, t.stride(), t.storage_offset()).reshape(-1) for t in (one, other)
    )
    return bool(torch.isin(own, others).any())


def _refuse_shared_memory(module: nn.Module) -> None:
    """Refuse parameters that have elements in common."""
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, p in module.named_parameters():
        if p.layout == torch.strided and p.numel():
            where = p.untyped_storage().data_ptr()
            by_storage.setdefault(where, []).append((name, p))
    for sharing in by_storage.values():
        for (one, first), (other, second) in combinations(sharing, 2):
            if _overlap(first, second):
                raise ValueError(
                    f"discriminator: parameters {one!r} and {other!r} share memory, so that a step "
                    "of one moves the other, which a look-ahead step does not. Make them one "
                    "nn.Parameter, transposed where it is used, or use parametrizations."
                )


def checked_steps(unroll_steps: object) -> int:
    """Return K, or refuse what is not a count."""
    if not isinstance(unroll_steps, int) or isinstance(unroll_steps, bool):
        raise TypeError(
            "unroll_steps: must be an int, the number K of look-ahead steps; got "
            f"{unroll_steps!r} ({type(unroll_steps).__name__})."
        )
    if unroll_steps < 0:
        raise ValueError(
            f"unroll_steps: must be at least 0; got {unroll_steps}. Use 0 for the ordinary loss."
        )
    return unroll_steps


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


def minibatches_checked(
    minibatches: Iterable[tuple[Batch, Batch]], steps: int, *, needs_graph: bool
) -> Iterator[tuple[Batch, Batch]]:
    """Return an iterator over exactly ``steps`` (fake_k, real_k) pairs, which draws no more."""
    if not isinstance(minibatches, Iterable):
        raise TypeError(
            "minibatches: must be an iterable of (fake, real) pairs; got "
            f"{type(minibatches).__name__}. Pass for instance a list of {steps} pairs."
        )
    return _exactly(iter(minibatches), steps, needs_graph=needs_graph)


def _exactly(
    iterator: Iterator[tuple[Batch, Batch]], steps: int, *, needs_graph: bool
) -> Iterator[tuple[Batch, Batch]]:
    for k in range(steps):
        try:
            pair = next(iterator)
        except StopIteration:
            raise ValueError(
                f"minibatches: must hold one (fake, real) pair for each of the {steps} look-ahead "
                f"steps; only {k} came. Pass {steps} pairs or set unroll_steps={k}."
            ) from None
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                "minibatches: must yield (fake, real) pairs; item "
                f"{k} is a {type(pair).__name__}. Yield (generator(z), real)."
            )
        if needs_graph:
            check_differentiable(pair[0], f"minibatches, fake {k}")
        yield pair[0], pair[1]


def check_differentiable(fake: Batch, what: str) -> None:
    """Refuse fakes without a path to a generator."""
    if not any(t.requires_grad for t in tensors(fake)):
        raise ValueError(
            f"{what}: must carry the generator's graph, through which both terms of Eq. 12 flow; "
            "no tensor in it requires a gradient. Do not detach it or make it under "
            "torch.no_grad(). To evaluate only, call the loss under torch.no_grad(); for the "
            "first term alone, set stop_gradient=True."
        )


def projected(project: Project, theta: dict[str, Tensor], *, inspect: bool) -> dict[str, Tensor]:
    """Return what ``project`` makes of theta, or refuse what cannot be differentiated."""
    # Clones, so that a projection may write in place, as one of real parameters does.
    given = {name: value.clone() for name, value in theta.items()}
    histories = {name: value.grad_fn for name, value in given.items()}
    found = project(dict(given))
    if not isinstance(found, Mapping) or found.keys() != theta.keys():
        got = list(found) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(
            "project: must return a mapping with the names that it was given, "
            f"{list(theta)}; got {got}. Return all parameters, changed or not."
        )
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"project: must return tensors; {name!r} is a {type(value).__name__}. Keep the "
                "parameters as tensors, so that they can be differentiated through."
            )
        if value.shape != theta[name].shape:
            raise ValueError(
                f"project: must keep the shapes of the parameters; {name!r} came with "
                f"{tuple(theta[name].shape)} and left with {tuple(value.shape)}."
            )
        if not torch.is_grad_enabled() or not theta[name].requires_grad:
            continue
        untracked = inspect and value.grad_fn is histories[name]
        if not value.requires_grad or (untracked and not same(value, theta[name])):
            raise ValueError(
                f"project: must be differentiable; it changed {name!r} outside autograd (under "
                "torch.no_grad(), through .data, or detached). Use p.clamp(...) and the like."
            )
    return dict(found)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, NaN for NaN."""
    return torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())
