"""A self-check of f_K's gradient against central differences, on float64 copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from unroll._diagnostics.central import gradients_of
from unroll._diagnostics.copies import InDouble, double, in_double, standing_in
from unroll._diagnostics.differences import Check
from unroll._diagnostics.report import GradientReport, Report
from unroll._functional import Batch, Pair, map_tensors, tensors
from unroll._inspection import DETACHED_FAKES
from unroll._loss import UnrolledGeneratorLoss
from unroll._probes import leaf
from unroll._random import every_random_state, set_every_random_state
from unroll._validation import drawn_minibatches


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
    theta_D^1..K held. It costs 30 to 140 evaluations of the loss for each tensor of fakes (most
    where nothing can be told): call it once, on a small batch, before training.

    Args:
        loss: The unrolled loss.
        fake: Generated samples, as for ``loss``; they may be detached.
        real: Real samples.
        minibatches: As for ``loss``; exactly K pairs are drawn. Default: none.

    Returns:
        A report with the verdict, the error and what may be wrong.

    Raises:
        TypeError: D, the optimizer, the objective or ``project`` cannot be copied, or
            ``minibatches`` holds something else than pairs; their code runs in its own type only,
            not in float64; no fakes are floating-point.
        ValueError: ``minibatches`` holds fewer than K pairs.

    Example:
        >>> import torch, unroll
        >>> d = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.Adam(d.parameters())
        >>> loss = unroll.UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
        >>> unroll.check_gradients(loss, torch.randn(16, 2), torch.randn(16, 2)).ok
        True
    """
    if minibatches is not None:
        minibatches = drawn_minibatches(minibatches, loss.unroll_steps)
    batch, resampled = map_tensors(double, ((fake, real), minibatches))
    every = tensors([f for f, _ in (batch, *(resampled or ()))])
    fakes = [t.requires_grad_() for t in every if t.is_floating_point()]
    if not fakes:
        kinds = [str(t.dtype) for t in tensors(fake)]
        raise TypeError(
            f"fake: must hold a floating-point tensor, for check_gradients to move; got {kinds}. "
            "Give torch.view_as_real of complex samples, and let D's forward put them together."
        )
    device = fakes[0].device
    state = every_random_state(device)
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = loss.discriminator.parameters()
        mode = InDouble(next(p.dtype for p in own if p.is_floating_point()))
        check = Check(in_double(loss, mode), batch, resampled, mode)
        try:
            with mode, standing_in(check.loss.discriminator, loss.discriminator):
                report = check.run(fakes)
        except Exception as failure:
            given = map_tensors(leaf, (fake, real, minibatches))
            value = loss(given[0], given[1], minibatches=given[2])
            gradients_of(value, [t for t in tensors(given[0]) if t.requires_grad])
            raise TypeError(
                "loss: check_gradients computes in float64, in which the code of D or of the "
                f"objective fails, though not in its own type ({type(failure).__name__}: "
                f"{failure}). Let it keep the type of its input in place of one that it names."
            ) from failure
        finally:
            set_every_random_state(state, device)
    words = report.suspicions
    if any(str(w.message) == DETACHED_FAKES for w in caught):
        words += ("the objective (or D) detaches the fakes in discriminator_loss",)
    elif words or report.verdict != "wrong":
        return report
    operations = (
        "the objective (or D, at K = 0 or with stop_gradient=True): its own operations have a "
        "wrong derivative (does it detach, use .data or a straight-through estimator?)"
    )
    return Report("wrong", report.relative_error, words or (operations,))
