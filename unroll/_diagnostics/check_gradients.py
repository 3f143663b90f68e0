"""A self-check of f_K's gradient against central differences."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from unroll._diagnostics.copies import double, in_double
from unroll._diagnostics.differences import TOLERANCE, DifferenceCheck
from unroll._functional import Batch, Pair, map_tensors, tensors
from unroll._inspection import DETACHED_FAKES, calls_to_the_module_itself
from unroll._loss import UnrolledGeneratorLoss
from unroll._validation import drawn_minibatches


@dataclass(frozen=True)
class GradientReport:
    """What :func:`check_gradients` found.

    Attributes:
        ok: Whether the gradient agrees with central differences and nothing is suspicious.
        relative_error: The largest difference between a directional derivative and its central
            difference, over the norm of the gradient.
        suspicions: What may be wrong, in words; empty if nothing is.
    """

    ok: bool
    relative_error: float
    suspicions: tuple[str, ...]


def check_gradients(
    loss: UnrolledGeneratorLoss,
    fake: Batch,
    real: Batch,
    *,
    minibatches: Iterable[Pair] | None = None,
) -> GradientReport:
    """Compare f_K's gradient with central differences, for your own D, optimizer and objective.

    Everything is copied in float64 first, so nothing of yours changes. Random numbers are replayed
    from one state, so that dropout passes. With ``stop_gradient`` the differences are taken with
    theta_D^1..K held. It costs some twenty evaluations of the loss for each tensor of fakes: call
    it once, on a small batch, before training.

    Args:
        loss: The unrolled loss.
        fake: Generated samples, as for ``loss``; they may be detached.
        real: Real samples.
        minibatches: As for ``loss``; exactly K pairs are drawn. Default: none.

    Returns:
        A report with the verdict, the error and what may be wrong.

    Raises:
        TypeError: D, the optimizer, the objective or ``project`` cannot be copied, or
            ``minibatches`` holds something else than pairs.
        ValueError: ``minibatches`` holds fewer than K pairs.

    Example:
        >>> import torch, unroll
        >>> d = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.Adam(d.parameters())
        >>> loss = unroll.UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
        >>> unroll.check_gradients(loss, torch.randn(16, 2), torch.randn(16, 2)).ok
        True
    """
    pairs = [(fake, real)]
    if minibatches is not None:
        pairs += drawn_minibatches(minibatches, loss.unroll_steps)
    copies = map_tensors(double, pairs)
    fakes = [t.requires_grad_() for f, _ in copies for t in tensors(f) if t.is_floating_point()]
    with (
        torch.random.fork_rng(),
        torch.enable_grad(),
        warnings.catch_warnings(record=True) as caught,
        calls_to_the_module_itself(loss.discriminator) as strays,
    ):
        warnings.simplefilter("always")
        resampled = copies[1:] if minibatches is not None else None
        check = DifferenceCheck(in_double(loss), copies[0], resampled)
        with calls_to_the_module_itself(check.loss.discriminator) as more_strays:
            try:
                error, suspicions = check.run(fakes)
            except Exception:
                if not strays and not more_strays:
                    raise
                error, suspicions = float("inf"), []
    if strays or more_strays:
        suspicions.append(
            "the objective calls the discriminator module itself; it must call the `discriminator` "
            "that it is given, which is D at theta_D^k"
        )
    if any(str(w.message) == DETACHED_FAKES for w in caught):
        suspicions.append("the objective (or D) detaches the fakes in discriminator_loss")
    if error > TOLERANCE and not suspicions:
        suspicions.append("the objective: its own operations have a wrong derivative")
    return GradientReport(error <= TOLERANCE and not suspicions, error, tuple(suspicions))
