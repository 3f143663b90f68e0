"""The two terms of Eq. 12, and a self-check of f_K's gradient against central differences."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unroll.copies import double, in_double
from unroll.differences import TOLERANCE, DifferenceCheck
from unroll.inspection import DETACHED_FAKES, calls_to_the_module_itself
from unroll.loss import UnrolledGeneratorLoss
from unroll.stateless import Batch, map_tensors, tensors
from unroll.steps.checks import checked_steps, minibatches_checked


def gradient_terms(
    loss: UnrolledGeneratorLoss,
    fake: Batch,
    real: Batch,
    generator_parameters: Iterable[Tensor],
    *,
    minibatches: Iterable[tuple[Batch, Batch]] | None = None,
    optimizer_state: Any = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the two terms of df_K/dtheta_G (Eq. 12), which sum to the full gradient.

    ::

        df_K/dtheta_G = df/dtheta_G + df/dtheta_D^K * dtheta_D^K/dtheta_G

    Args:
        loss: The unrolled loss, with ``stop_gradient=False``.
        fake: Generated samples, in the graph of ``generator_parameters``, as for ``loss``.
        real: Real samples, as for ``loss``.
        generator_parameters: Tensors to differentiate in, such as ``generator.parameters()``.
        minibatches: As for ``loss``. Default: none.
        optimizer_state: As for ``loss``. Default: none.

    Returns:
        Two tuples of tensors with the shapes of ``generator_parameters``: the first term, how f
        changes with the fakes at a fixed theta_D^K, and the second, how D reacts to a change of G.
        Zeros, never None; the second is zero at K = 0.

    Raises:
        ValueError: ``loss.stop_gradient`` is set, or ``fake`` carries no graph.
        RuntimeError: Gradients are switched off.

    Example:
        >>> import torch, unroll
        >>> g, d = torch.nn.Linear(8, 2), torch.nn.Linear(2, 1)
        >>> loss = unroll.UnrolledGeneratorLoss(
        ...     d, torch.optim.SGD(d.parameters(), lr=0.1), unroll_steps=3
        ... )
        >>> fake, real = g(torch.randn(16, 8)), torch.randn(16, 2)
        >>> first, second = unroll.gradient_terms(loss, fake, real, g.parameters())
        >>> [t.shape for t in second]
        [torch.Size([2, 8]), torch.Size([2])]
    """
    if loss.stop_gradient:
        raise ValueError(
            "loss: must have stop_gradient=False; with stop_gradient=True Eq. 12 has its first "
            "term only. Set loss.stop_gradient = False for this call."
        )
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "gradient_terms: must run with gradients on; it was called under torch.no_grad()."
        )
    everything = list(generator_parameters)
    theta_g = [p for p in everything if p.requires_grad]
    with loss._held():
        pairs = loss._pairs(fake, real, minibatches, needs_graph=True)
        points, _ = loss._look_ahead(pairs, optimizer_state)
        # Cut the graph at theta_D^1..K (and at buffers that carry one): leaves on the near side.
        far: list[Tensor] = []
        near: list[Tensor] = []

        def cut(tensor: Tensor) -> Tensor:
            if tensor.grad_fn is None:
                return tensor
            far.append(tensor)
            near.append(tensor.detach().requires_grad_())
            return near[-1]

        held_points = [
            point._replace(
                parameters={name: cut(p) for name, p in point.parameters.items()},
                buffers={name: cut(b) for name, b in point.buffers.items()},
            )
            for point in points
        ]
        value = loss._surrogate(held_points, fake, real)
    gradients = _gradients([value], [*theta_g, *near])
    first, reactions = gradients[: len(theta_g)], gradients[len(theta_g) :]
    second = tuple(map(torch.zeros_like, first))
    if far:
        second = _gradients(far, theta_g, reactions)

    def in_place(found: Iterable[Tensor]) -> tuple[Tensor, ...]:
        terms = iter(found)
        return tuple(next(terms) if p.requires_grad else torch.zeros_like(p) for p in everything)

    return in_place(first), in_place(second)


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(
            outputs, inputs, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
        raise RuntimeError(
            "fake: comes from a compiled generator, which can be differentiated once, and the two "
            "terms need it twice. Make it by the module inside, generator._orig_mod."
        ) from error


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
    minibatches: Iterable[tuple[Batch, Batch]] | None = None,
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
        pairs += minibatches_checked(
            minibatches, checked_steps(loss.unroll_steps), needs_graph=False
        )
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
