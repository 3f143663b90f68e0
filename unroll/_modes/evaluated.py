"""f_0 with its gradient at once, for a D that recomputes itself in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unroll._functional import Functional, FunctionalDiscriminator, Pair, tensors, views
from unroll._look_ahead import Point, Value
from unroll._modes.adjoint import filled, leaves, recorded
from unroll._objectives import Objective


def evaluated(discriminator: Functional, objective: Objective) -> Value:
    """Return f as a function whose backward pass does not run D again.

    Activation checkpointing inside D finds theta_D^0 and private buffers in it as long as the call
    lasts; later it would find what the user has, and change it. So the gradient is taken meanwhile.
    """

    def value(point: Point, pair: Pair) -> Tensor:
        def forward(inputs: Any, needed: Any) -> Any:
            points = leaves(inputs, needed)

            def differentiated(d: FunctionalDiscriminator) -> Tensor:
                f = objective.generator_loss(d, *views(filled(pair, points)))
                torch.autograd.backward(f)  # autograd.grad refuses the reentrant form
                return f

            with torch.enable_grad():
                f, _ = discriminator(differentiated, point.parameters, point.buffers)
            found = [torch.zeros_like(t) if t.grad is None else t.grad for t in points]
            return [f.detach()], [True], found

        def backward(saved: Any, tangents: Any, needed: Any) -> Any:
            (tangent,) = tangents
            return [tangent * g if need else None for g, need in zip(saved, needed, strict=True)]

        way_out = "Switch torch.utils.checkpoint off in D."
        (f,) = recorded("discriminator", way_out, forward, backward, tensors(pair))
        return f

    return value
