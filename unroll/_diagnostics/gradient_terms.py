"""The two terms of Eq. 12."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from unroll._functional import Batch, Pair, preserved, tensors
from unroll._look_ahead import surrogate
from unroll._loss import UnrolledGeneratorLoss
from unroll._modes.adjoint import filled, leaves


def gradient_terms(
    loss: UnrolledGeneratorLoss,
    fake: Batch,
    real: Batch,
    generator_parameters: Iterable[Tensor],
    *,
    minibatches: Iterable[Pair] | None = None,
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
            "term only. Make the loss with stop_gradient=False for this call."
        )
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "gradient_terms: must run with gradients on; it was called under torch.no_grad()."
        )
    everything = list(generator_parameters)
    theta_g = [p for p in everything if p.requires_grad]
    batch = fake, real
    pairs = loss._pairs(batch, minibatches, differentiable=True)
    with preserved(*loss._parts):
        points, value = loss._points(batch, pairs, optimizer_state)
        # Cut the graph at theta_D^1..K (and at buffers that carry one): leaves on the near side.
        ends = [point._replace(optimizer_state=None) for point in points]
        cut = leaves(tensors(ends), [t.requires_grad for t in tensors(ends)])
        f_k = surrogate(value, filled(ends, cut), batch)
    far, near = ([t for t in side if t.requires_grad] for side in (tensors(ends), cut))
    gradients = _gradients([f_k], [*theta_g, *near])
    first, reactions = gradients[: len(theta_g)], gradients[len(theta_g) :]
    second = _gradients(far, theta_g, reactions) if far else tuple(map(torch.zeros_like, first))

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
