"""A self-check: whether the look-ahead takes the steps of the user's own loop."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from unroll._diagnostics.step_faults import judged
from unroll._diagnostics.step_record import Call, Update, double, entries, minus, taken
from unroll._functional import CONTAINERS, Batch, Pair, map_tensors, preserved, put_back, tensors
from unroll._look_ahead import Game, without_autocast_cache
from unroll._loss import UnrolledGeneratorLoss
from unroll._modes.comparison import perturbed
from unroll._optimizers import unwrap_optimizer
from unroll._optimizers.torchopt_transformation import Transformation
from unroll._random import every_random_state, set_every_random_state

# What is switched off in both steps; a `D.train()` does not switch it on again.
_DRAWING = (
    (_DropoutNd, "p"),
    (nn.RNNBase, "dropout"),
    (nn.MultiheadAttention, "dropout"),
    ((_SpectralNorm, SpectralNorm), "n_power_iterations"),
)


@dataclass(frozen=True)
class StepReport:
    """What :func:`check_step` found.

    Attributes:
        verdict: ``"right"``, ``"wrong"`` or ``"inconclusive"``.
        relative_error: The largest difference of the gradients or of the movement of D's
            parameters between a step of the loop and one of the look-ahead, relative to the latter.
        suspicions: What differs and what mends it, or why nothing can be told; empty if right.
    """

    verdict: str
    relative_error: float
    suspicions: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the verdict is ``"right"``."""
        return self.verdict == "right"


def check_step(
    loss: UnrolledGeneratorLoss,
    step: Callable[[Batch, Batch], object],
    fake: Batch,
    real: Batch,
    *,
    also: Iterable[Any] = (),
) -> StepReport:
    """Tell whether the look-ahead plays the game of your loop: whether its steps are your steps.

    ``step`` runs K times (once at K = 0) on the real D and optimizer, and each step is compared
    with the look-ahead's from the same point: the gradients that reach the optimizer, its state,
    D's parameters. Dropout is off and spectral norm's power iteration stands still meanwhile. What
    the look-ahead itself differs by when its inputs move by a few units in the last place counts as
    round-off. Afterwards D, the optimizer, the random generators and what ``also`` names are as
    they were, bit for bit, also where ``step`` raises.

    It does not see what ``step`` is not part of: an update of D elsewhere in the loop, a second
    step on other samples, an autocast around one of the two (call it under the loop's own).

    Args:
        loss: The unrolled loss.
        step: Your own update of D, a function of ``(fake, real)``: ``zero_grad``, the loss, its
            ``backward``, the optimizer's ``step`` and what follows it.
        fake: Generated samples, as for ``loss``; ``step`` gets them detached.
        real: Real samples.
        also: What else ``step`` changes and has a ``state_dict``: a generator, a scheduler, a
            GradScaler, an average of weights. Default: nothing.

    Returns:
        A report with the verdict, the error and what mends it.

    Raises:
        TypeError: ``loss`` was given a bare transformation, ``step`` is no function, or ``also``
            holds something without a ``state_dict``.

    Example:
        >>> import torch, unroll
        >>> d = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(d.parameters())
        >>> loss = unroll.UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
        >>> def step(fake, real):
        ...     optimizer.zero_grad()
        ...     loss.discriminator_loss(fake, real).backward()
        ...     optimizer.step()
        >>> unroll.check_step(loss, step, torch.randn(16, 2), torch.randn(16, 2)).ok
        True
    """
    optimizer = unwrap_optimizer(loss.optimizer)
    also = _checked(optimizer, step, also)
    held = [loss.discriminator, optimizer, loss._moving, *loss._parts[1], *also]
    device = next(loss.discriminator.parameters()).device
    compiled = "torch._dynamo" in sys.modules  # compiled parts round otherwise
    with (
        _given_back(held, also, device),
        without_autocast_cache(),  # which would be that of weights before a step
        ExitStack() as stack,
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
    ):
        with preserved(*loss._parts):
            inner = loss._start(None)[0].optimizer
        if isinstance(inner, Transformation):  # a momentum keeps state in a closure
            stack.callback(inner._swap, inner._first_calls)
        _silence(loss.discriminator)
        batch, steps = (fake, real), range(max(loss.unroll_steps, 1))
        return StepReport(*judged(_called(loss, optimizer, step, batch, device) for _ in steps))


def _checked(optimizer: Any, step: object, also: Any) -> list[Any]:
    if not isinstance(optimizer, (torch.optim.Optimizer, torchopt.Optimizer)):
        raise TypeError(
            "loss: must hold an optimizer of torch.optim or a torchopt.Optimizer, which steps D in "
            f"place, for its steps to be compared; it holds a {type(optimizer).__name__}. Make the "
            "loss with torchopt.Optimizer(D.parameters(), transformation), or with what trains D."
        )
    if not callable(step):
        raise TypeError(
            "step: must be your update of D, a function of (fake, real); got "
            f"{type(step).__name__}. Put D's part of the loop's body into a function."
        )
    listed = list(also) if isinstance(also, Iterable) else [also]
    for item in listed:
        if not all(hasattr(item, name) for name in ("state_dict", "load_state_dict")):
            raise TypeError(
                "also: must hold objects with state_dict and load_state_dict, to be given back as "
                f"they were; got {type(item).__name__}. Leave it out, or add the two methods."
            )
    return listed


def _silence(module: nn.Module) -> None:
    """Switch dropout and power iterations off, whatever mode ``step`` puts D in."""
    for part in (*module.modules(), *_hooks(module)):
        vars(part).update({name: 0 for kinds, name in _DRAWING if isinstance(part, kinds)})


def _hooks(module: nn.Module) -> list[Any]:
    hooks = (hook for part in module.modules() for hook in part._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, SpectralNorm)]


def _called(
    loss: UnrolledGeneratorLoss, optimizer: Any, step: Any, batch: Pair, device: torch.device
) -> Call:
    """Run ``step`` once, and the look-ahead's step from the same point and random numbers."""
    module, random = loss.discriminator, every_random_state(device)
    with preserved(*loss._parts), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the next look-ahead says it again
        game, point = loss._start(None)
    pair = map_tensors(lambda t: t.detach().clone(), batch)
    given = point, pair, game.optimizer.settings
    ours, drawn = taken(loss, game, *given), every_random_state(device)
    set_every_random_state(random, device)
    nudged = taken(loss, game, *map_tensors(perturbed, given))
    set_every_random_state(random, device)
    leaves = [(n, p) for n, p in module.named_parameters() if p.is_leaf]
    left = double({n: p.grad for n, p in leaves if p.grad is not None})
    start, aside = dict(point.parameters), [(t, t._version) for t in game.optimizer.others]
    with _observed(optimizer, game) as seen:
        step(*map_tensors(lambda t: t.detach().clone(), batch))
    named = dict(module.named_parameters())
    state = getattr(optimizer, "state_groups", None)
    if isinstance(optimizer, torch.optim.Optimizer):
        state = {n: optimizer.state[p] for n, p in named.items() if p in optimizer.state}
    gradients, begun, _ = seen[0] if seen else ({}, start, None)
    real = Update(gradients, minus(double(named), double(start)), entries(state))
    states = [
        repr([*map(Tensor.tolist, tensors(s[0])), *s[1:]])
        for s in (random, drawn, every_random_state(device))
    ]
    return Call(
        loss, game, point, pair, random, (real, ours, nudged),
        settings=[settings for *_, settings in seen],
        early=[n for n, p in start.items() if not torch.equal(p, begun[n])],
        left=left,
        strangers=[str(tuple(t.shape)) for t, old in aside if t._version != old],
        drew=len(set(states)) > 1,
    )  # fmt: skip


@contextmanager
def _observed(optimizer: Any, game: Game) -> Iterator[list[Any]]:
    """Record what reaches every step of the optimizer: parameters alone hide a loss's scale."""
    seen: list[Any] = []
    module = game.discriminator.module

    def look() -> None:
        scale = getattr(optimizer, "grad_scale", None)  # a GradScaler's, for a fused step
        named = dict(module.named_parameters())
        held = {n: p.grad for n, p in named.items() if n in game.optimizer.names}
        gradients = double({n: g for n, g in held.items() if g is not None})
        if scale is not None:
            gradients = {n: g / scale.item() for n, g in gradients.items()}
        groups = [g for g in optimizer.param_groups if isinstance(g, dict)]
        seen.append(
            (
                gradients,
                {n: p.detach().clone() for n, p in named.items()},
                [{**g, "params": None} for g in groups],
            )
        )

    def looking(closure: Any) -> Any:
        value = closure()  # which brings the gradients
        look()
        return value

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        closure: Any = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            return args[:1], {**kwargs, "closure": partial(looking, closure)}
        return looking(lambda: None)

    with ExitStack() as stack:
        if isinstance(optimizer, torch.optim.Optimizer):
            stack.callback(optimizer.register_step_pre_hook(hook).remove)
        else:
            plain = optimizer.step
            stack.callback(vars(optimizer).pop, "step")
            optimizer.step = lambda c=None: plain(partial(looking, c or (lambda: None)))
        yield seen


@contextmanager
def _given_back(held: list[Any], also: list[Any], device: torch.device) -> Iterator[None]:
    """Give everything back bit for bit: tensors, their gradients and flags, what holds them."""
    kept: list[tuple[Tensor, Tensor, Tensor, bool, Tensor | None]] = []
    containers: list[tuple[Any, Any]] = []
    seen: set[int] = set()

    def keep(value: Any) -> None:
        if id(value) in seen:
            return
        if isinstance(value, Tensor):
            seen.add(id(value))
            grad = value.grad if value.is_leaf else None
            copied = value.detach().clone()
            kept.append((value, value.data, copied, value.requires_grad, grad))
            keep(grad)
        elif isinstance(value, tuple):
            for item in value:
                keep(item)
        elif type(value) in CONTAINERS:
            seen.add(id(value))
            containers.append((value, copy.copy(value)))
            for item in value.values() if isinstance(value, dict) else value:
                keep(item)
        elif isinstance(value, nn.Module):
            keep(vars(value))

    for item in (*held, *_hooks(held[0])):
        keep(getattr(item, "__dict__", None))
    states = [copy.deepcopy(item.state_dict()) for item in also]
    random = every_random_state(device)
    try:
        yield
    finally:
        for item, state in zip(also, states, strict=True):
            item.load_state_dict(state)
        put_back(containers)
        for tensor, data, content, flag, grad in kept:
            tensor.data = data
            data.copy_(content)
            if tensor.is_leaf:
                tensor.requires_grad_(flag)
                tensor.grad = grad
        set_every_random_state(random, device)
