"""A self-check: whether the look-ahead takes the steps of the user's own loop."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from unroll._autograd_fixes import stance
from unroll._diagnostics.report import StepReport
from unroll._diagnostics.step_faults import judged
from unroll._diagnostics.step_record import Call
from unroll._functional import CONTAINERS, Batch, put_back
from unroll._look_ahead import without_autocast_cache
from unroll._loss import UnrolledGeneratorLoss
from unroll._optimizers import inner_optimizer, unwrapped_optimizers
from unroll._optimizers.torchopt_transformation import Transformation
from unroll._random import every_random_state, set_every_random_state

# What is switched off in both steps; a `D.train()` does not switch it on again.
_DRAWING = (
    (_DropoutNd, "p"),
    (nn.RNNBase, "dropout"),
    (nn.MultiheadAttention, "dropout"),
    ((_SpectralNorm, SpectralNorm), "n_power_iterations"),
)


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
    step on other samples, an autocast around one of the two (call it under the loop's own). Call
    it with D in the mode that it has at the generator's step.

    Args:
        loss: The unrolled loss.
        step: Your own update of D, a function of ``(fake, real)``: ``zero_grad``, the loss, its
            ``backward``, the optimizer's ``step`` and what follows it.
        fake: Generated samples, as for ``loss``; ``step`` gets copies, cut off from G.
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
    optimizers = unwrapped_optimizers(loss.optimizer)
    also = _checked(optimizers, step, also)
    held = [loss.discriminator, *optimizers, loss._moving, *loss._parts[1], *also]
    device = next(loss.discriminator.parameters()).device
    compiled = "torch._dynamo" in sys.modules  # compiled parts round otherwise
    with (
        _given_back(held, also, device),
        without_autocast_cache(),  # which would be that of weights before a step
        ExitStack() as stack,
        torch.enable_grad(),
        stance("force_eager") if compiled else nullcontext(),
    ):
        for one in optimizers:  # a momentum of torchopt keeps state in a closure
            inner: Any = inner_optimizer(one, dict(loss.discriminator.named_parameters()))
            if isinstance(inner, Transformation):
                stack.callback(inner._swap, inner._first_calls)
        _silence(loss.discriminator)
        steps = range(max(loss.unroll_steps, 1))
        return judged(Call(loss, optimizers, step, (fake, real)) for _ in steps)


def _checked(optimizers: list[Any], step: object, also: Any) -> list[Any]:
    for optimizer in optimizers:
        if not isinstance(optimizer, (torch.optim.Optimizer, torchopt.Optimizer)):
            raise TypeError(
                "loss: must hold an optimizer of torch.optim or a torchopt.Optimizer, which steps "
                "D in place, for its steps to be compared; it holds a "
                f"{type(optimizer).__name__}. Make the loss with torchopt.Optimizer("
                "D.parameters(), transformation), or with what trains D."
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
    hooks = (hook for part in module.modules() for hook in part._forward_pre_hooks.values())
    for part in (*module.modules(), *hooks):
        for name in (name for kinds, name in _DRAWING if isinstance(part, kinds)):
            vars(part)[name] = 0


@contextmanager
def _given_back(held: list[Any], also: list[Any], device: torch.device) -> Iterator[None]:
    """Give everything back bit for bit: tensors, their gradients and flags, what holds them."""
    kept: list[tuple[Tensor, Tensor, Tensor, bool, Tensor | None]] = []
    containers: list[tuple[Any, Any]] = []
    stack: list[Any] = [getattr(item, "__dict__", None) for item in held]
    seen: dict[int, Any] = {}
    while stack:
        value = stack.pop()
        value = vars(value) if isinstance(value, (nn.Module, SpectralNorm)) else value
        if isinstance(value, tuple):
            stack.extend(value)
        elif id(value) in seen:
            continue
        elif isinstance(value, Tensor):
            grad = value.grad if value.is_leaf else None
            kept.append((value, value.data, value.detach().clone(), value.requires_grad, grad))
            stack.append(grad)
        elif type(value) in CONTAINERS:
            containers.append((value, copy.copy(value)))
            stack.extend(value.values() if isinstance(value, dict) else value)
        seen[id(value)] = value
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
