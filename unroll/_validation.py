"""What the look-ahead accepts: discriminators, objectives, K, minibatches, losses, projections."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from unroll._functional import Batch, Pair, tensors, unwrap_once
from unroll._objectives import (
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    Objective,
    RelativisticAverage,
    RelativisticPairing,
    Wasserstein,
)
from unroll._penalties import summands

Project = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
ON_LOGITS = (
    *(Minimax, NonSaturating, LeastSquares, Hinge, Wasserstein),
    *(RelativisticPairing, RelativisticAverage),
)


def checked_arguments(discriminator: object, objective: Any, project: object) -> nn.Module:
    """Return the user's own module inside all wrappers, after a look at what goes with it."""
    module = _checked_discriminator(discriminator)
    _check_objective(objective)
    _check_project(project)
    _warn_of_sigmoid(module, objective)
    return module


def _checked_discriminator(discriminator: object) -> nn.Module:
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
    return bool(torch.isin(_places(one), _places(other)).any())


def _places(t: Tensor) -> Tensor:
    """Return where the elements of a tensor are in its storage."""
    places = torch.tensor(t.storage_offset())
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = places[..., None] + stride * torch.arange(size)
    return places.flatten()


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


def _check_objective(objective: object) -> None:
    """Refuse what is not an objective."""
    for method in ("discriminator_loss", "generator_loss"):
        if isinstance(objective, type) or not callable(getattr(objective, method, None)):
            raise TypeError(
                "objective: must be an object with the methods discriminator_loss and "
                f"generator_loss; got {objective!r}. Pass for instance unroll.Minimax(), or wrap "
                "a torch loss in unroll.Criterion(...)."
            )


def _check_project(project: object) -> None:
    """Refuse a projection that is no function."""
    if project is not None and not callable(project):
        raise TypeError(
            "project: must be a function from a mapping of parameters to one; got "
            f"{type(project).__name__}. Pass for instance a function that clamps each of them."
        )


def _warn_of_sigmoid(module: nn.Module, objective: Objective) -> None:
    """Warn of a discriminator that returns probabilities to an objective that takes logits."""
    on_logits = any(isinstance(part, ON_LOGITS) for part in summands(objective))
    if on_logits and isinstance(list(module.modules())[-1], nn.Sigmoid):
        warnings.warn(
            "discriminator: ends in nn.Sigmoid, but the objective takes logits and would apply a "
            "second one. Remove the Sigmoid, or use unroll.Criterion(nn.BCELoss()).",
            stacklevel=4,
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


def drawn(
    batch: Pair, minibatches: Iterable[Pair] | None, steps: int, *, differentiable: bool
) -> list[Pair]:
    """Return what each step sees; refuse fakes without a path to G where ``differentiable``."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "UnrolledGeneratorLoss: the look-ahead differentiates and so cannot run in "
            "torch.inference_mode(). Use torch.no_grad() for a value without a graph."
        )
    if differentiable:
        check_differentiable(batch[0], "fake")
    if minibatches is None:
        return [batch] * steps
    pairs = drawn_minibatches(minibatches, steps)
    for k, (fake, _) in enumerate(pairs) if differentiable else ():
        check_differentiable(fake, f"minibatches, fake {k}")
    return pairs


def check_assignable(name: str, value: object) -> None:
    """Refuse what may not be assigned to a loss: all but K and what tools keep on a module."""
    if name == "unroll_steps":
        checked_steps(value)
    elif not (name.startswith("_") or name == "training"):
        raise AttributeError(
            f"{name}: cannot be assigned, of a loss only unroll_steps can; got {value!r}. Make a "
            "new UnrolledGeneratorLoss, which costs nothing, or check the spelling."
        )


def drawn_minibatches(minibatches: Iterable[Pair], steps: int) -> list[Pair]:
    """Return exactly ``steps`` (fake_k, real_k) pairs, and draw no more."""
    if not isinstance(minibatches, Iterable):
        raise TypeError(
            "minibatches: must be an iterable of (fake, real) pairs; got "
            f"{type(minibatches).__name__}. Pass for instance a list of {steps} pairs."
        )
    pairs: list[Pair] = []
    for k, pair in enumerate(islice(minibatches, steps)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                "minibatches: must yield (fake, real) pairs; item "
                f"{k} is a {type(pair).__name__}. Yield (generator(z), real)."
            )
        pairs.append((pair[0], pair[1]))
    if len(pairs) < steps:
        raise ValueError(
            f"minibatches: must hold one (fake, real) pair for each of the {steps} look-ahead "
            f"steps; only {len(pairs)} came. Pass {steps} pairs or set unroll_steps={len(pairs)}."
        )
    return pairs


def check_differentiable(fake: Batch, what: str) -> None:
    """Refuse fakes without a path to a generator."""
    if not any(t.requires_grad for t in tensors(fake)):
        raise ValueError(
            f"{what}: must carry the generator's graph, through which both terms of Eq. 12 flow; "
            "no tensor in it requires a gradient. Do not detach it or make it under "
            "torch.no_grad(). To evaluate only, call the loss under torch.no_grad(); for the "
            "first term alone, set stop_gradient=True."
        )


def check_gradients_found(gradients: Mapping[str, Tensor]) -> None:
    """Refuse a loss of D that depends on none of the parameters that move."""
    if not gradients:
        raise ValueError(
            "objective: discriminator_loss must depend on the parameters of the discriminator "
            "it is given; its loss depends on none that the optimizer trains. Call the "
            "`discriminator` argument, not the module itself, and do not detach its output."
        )


def projected(project: Project, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what ``project`` makes of theta, or refuse what cannot be differentiated."""
    # Clones, so that a projection may write in place, as one of real parameters does.
    found = project({name: value.clone() for name, value in theta.items()})
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
        if torch.is_grad_enabled() and theta[name].requires_grad and not value.requires_grad:
            raise ValueError(outside_autograd(name))
    return dict(found)


def outside_autograd(name: str) -> str:
    """Return the text of the refusal of a projection that leaves no trace in the graph."""
    return (
        f"project: must be differentiable; it changed {name!r} outside autograd (under "
        "torch.no_grad(), through .data, or detached). Use p.clamp(...) and the like."
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, NaN for NaN."""
    return torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())
