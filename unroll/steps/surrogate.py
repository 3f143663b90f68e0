"""f at theta_D^K, or its mean over theta_D^1..K: what the generator minimises (Eq. 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unroll.game import parts
from unroll.game.objectives import Objective
from unroll.inspection import refuse_own_parameters
from unroll.stateless import Batch, Stateless, aliased, tensors
from unroll.steps.checks import check_scalar
from unroll.steps.discriminator import At, Point
from unroll.steps.recompute import recomputed, refuse_unrepeatable


@dataclass
class Surrogate:
    """The generator's loss at points of the look-ahead; D must be held."""

    module: nn.Module
    objective: Objective
    constant: bool  # whether theta_D^1..K are constants
    checkpoint: bool  # whether the terms of a mean are computed again in the backward pass
    inspected: bool  # whether a value has been searched for D's own parameters

    def __call__(self, points: Sequence[Point], fake: Batch, real: Batch) -> Tensor:
        """Return f at one point, or its mean over several."""
        if len(points) == 1:
            return self._at(points[0], fake, real)
        where = self.module, parts(self.objective)
        values = []
        for point in points:
            given = (point._replace(optimizer_state=None), fake, real)
            if self.checkpoint and self.inspected and not self.constant:
                values.append(recomputed(self._again, *where, given))
                continue
            inspected = self.inspected
            values.append(self._at(*given))
            if self.checkpoint and self.inspected and not inspected:
                refuse_unrepeatable(self._again, *where, given)
        return torch.stack(values).mean()

    def _at(self, point: Point, fake: Batch, real: Batch) -> Tensor:
        """Return f at theta_D^k."""
        constant = self.constant or point.loss is None  # theta_D^0 takes no gradient
        theta = {name: p.detach() if constant else p for name, p in point.parameters.items()}
        # At theta_D, which needs no watching, a D that recomputes itself does so rightly.
        watched = point.loss is not None or not self.inspected
        module = Stateless(self.module)
        d = At(module, theta, point.buffers, twice=not constant, watched=watched)
        value = self.objective.generator_loss(d, aliased(fake), aliased(real))
        check_scalar(value, "generator_loss")
        if not self.inspected and value.requires_grad:
            between = [*tensors((fake, real)), *theta.values(), *point.buffers.values()]
            refuse_own_parameters(self.module, value, between)
            self.inspected = True
        return value

    def _again(self, point: Point, fake: Batch, real: Batch, *, graph: bool) -> Tensor:
        """Return f at theta_D^k in a form that can be computed again in the backward pass."""
        with torch.enable_grad():
            value = self._at(point, fake, real)
        return value if graph else value.detach().requires_grad_(value.requires_grad)
