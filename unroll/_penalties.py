"""Gradient penalties of the discriminator, added to an objective with ``+``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unroll._autograd_fixes import safe_sqrt
from unroll._functional import Batch, map_tensors, tensors
from unroll._objectives import Discriminator, Objective, one_tensor, paired


def _add(self: Objective, other: Objective) -> Sum:
    return Sum(self, other)


def _radd(self: Objective, other: Objective) -> Sum:
    return Sum(other, self)


@dataclass(frozen=True)
class Sum:
    """Two objectives, or an objective and a penalty, added up."""

    first: Objective
    second: Objective

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return the sum of both discriminator losses."""
        loss = self.first.discriminator_loss(discriminator, fake, real)
        return loss + self.second.discriminator_loss(discriminator, fake, real)

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return the sum of both generator losses."""
        loss = self.first.generator_loss(discriminator, fake, real)
        return loss + self.second.generator_loss(discriminator, fake, real)

    __add__ = _add
    __radd__ = _radd


def summands(objective: Objective) -> list[Objective]:
    """Return the summands of an objective."""
    if isinstance(objective, Sum):
        return [*summands(objective.first), *summands(objective.second)]
    return [objective]


def _first_floating(batch: Batch, what: str) -> int:
    """Return which tensor of a batch is the first floating-point one with samples."""
    found = tensors(batch)
    for index, tensor in enumerate(found):
        if tensor.is_floating_point() and tensor.dim():
            return index
    kinds = [str(tensor.dtype) for tensor in found] or type(batch).__name__
    raise TypeError(
        f"{what}: a gradient penalty needs a floating-point tensor of samples to differentiate in; "
        f"got {kinds}. Leave the penalty out, or pass samples as floating-point tensors."
    )


def _squared_gradient_norm(
    discriminator: Discriminator, batch: Batch, index: int, x: Tensor
) -> Tensor:
    """Return ``||dD/dx||^2`` per sample, where ``x`` takes the place of a tensor of the batch."""

    def output(point: Tensor) -> Tensor:
        places = iter(range(len(tensors(batch))))  # by place: one tensor may be in two of them
        moved = map_tensors(lambda t: point if next(places) == index else t, batch)
        return one_tensor(discriminator, moved).sum()

    gradient: Tensor
    if torch.compiler.is_compiling():  # torch.compile differentiates by torch.func only
        gradient = torch.func.grad(output)(x)
    else:
        # A view, so that the derivative is the partial one even if others depend on x.
        point = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(output(point), point, create_graph=True)
    return gradient.square().reshape(len(gradient), -1).sum(1)


def _input_penalty(discriminator: Discriminator, batch: Batch, gamma: float, what: str) -> Tensor:
    index = _first_floating(batch, what)
    norms = _squared_gradient_norm(discriminator, batch, index, tensors(batch)[index])
    return gamma / 2 * norms.mean()


@dataclass(frozen=True)
class R1:
    """``gamma / 2 * E[||dD/dx||^2]`` at real samples, added to D's loss (Mescheder et al. 2018).

    On a tuple or mapping it acts on the first floating-point tensor.

    Example:
        >>> import unroll
        >>> objective = unroll.RelativisticPairing() + unroll.R1(1.0) + unroll.R2(1.0)
    """

    gamma: float

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return the penalty."""
        return _input_penalty(discriminator, real, self.gamma, "real")

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return zero: the penalty reaches the generator through theta_D^K alone."""
        return _zero(fake)

    __add__ = _add
    __radd__ = _radd


@dataclass(frozen=True)
class R2:
    """``gamma / 2 * E[||dD/dx||^2]`` at generated samples, added to D's loss."""

    gamma: float

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return the penalty."""
        return _input_penalty(discriminator, fake, self.gamma, "fake")

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return zero: the penalty reaches the generator through theta_D^K alone."""
        return _zero(fake)

    __add__ = _add
    __radd__ = _radd


@dataclass(frozen=True)
class GradientPenalty:
    """WGAN-GP's ``weight * E[(||dD/dx|| - 1)^2]``, added to D's loss (Gulrajani et al. 2017).

    ``x`` lies uniformly at random between a real and a generated sample, drawn from torch's global
    generator; ``real`` and ``fake`` need equal shapes. The rest of a tuple or mapping (labels) is
    taken from ``real``.
    """

    weight: float = 10.0

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return the penalty."""
        index = _first_floating(real, "real")
        if isinstance(real, Mapping) and isinstance(fake, Mapping):  # by names, not by order
            fake = {key: fake[key] for key in real if key in fake}
        found = tensors(fake)
        y = found[index] if index < len(found) else found[_first_floating(fake, "fake")]
        x, y = paired(tensors(real)[index], y, "GradientPenalty")
        share = torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        between = share * x + (1 - share) * y
        norms = safe_sqrt(_squared_gradient_norm(discriminator, real, index, between))
        return self.weight * (norms - 1).square().mean()

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return zero: the penalty reaches the generator through theta_D^K alone."""
        return _zero(fake)

    __add__ = _add
    __radd__ = _radd


def _zero(batch: Batch) -> Tensor:
    return tensors(batch)[_first_floating(batch, "fake")].new_zeros(())
