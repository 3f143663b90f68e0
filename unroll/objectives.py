"""The game: what the discriminator and the generator minimise.

Every objective here is a small frozen dataclass with the two methods of :class:`Objective`; one of
your own needs the same two methods and no base class. Unless said otherwise the discriminator
returns logits of any shape, over which the losses average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from unroll.kernels import safe_sqrt
from unroll.stateless import Batch, map_tensors, tensors

Discriminator = Callable[[Batch], Any]


class Objective(Protocol):
    """A game between a discriminator and a generator: two losses, each to be minimised.

    ``discriminator`` is a pure callable, D at some theta_D^k. It takes a batch as it was given to
    the loss (a tensor, a tuple or a mapping) and unpacks it. An objective must use this callable
    and not the module itself, and must not detach ``fake``: the second term of Eq. 12 flows
    through it.

    Example:
        >>> class Squared:
        ...     def discriminator_loss(self, discriminator, fake, real):
        ...         return discriminator(fake).square().mean() - discriminator(real).mean()
        ...
        ...     def generator_loss(self, discriminator, fake, real):
        ...         return -discriminator(fake).mean()
    """

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return what the discriminator minimises, a 0-d tensor."""
        ...

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return what the generator minimises, a 0-d tensor."""
        ...


def _logits(discriminator: Discriminator, batch: Batch) -> Tensor:
    output = discriminator(batch)
    if not isinstance(output, Tensor):
        raise TypeError(
            "objective: needs a discriminator that returns one tensor; this one returned "
            f"{type(output).__name__}. Pass an objective of your own that combines the outputs "
            "(two methods, see unroll.Objective)."
        )
    return output


def _pair(real: Tensor, fake: Tensor, what: str) -> tuple[Tensor, Tensor]:
    if real.shape != fake.shape:
        raise ValueError(
            f"fake, real: {what} pairs them sample by sample, so they must have equal shapes; got "
            f"{tuple(real.shape)} for real and {tuple(fake.shape)} for fake. Use equal batch sizes."
        )
    return real, fake


@dataclass(frozen=True)
class Minimax:
    """The minimax game of Goodfellow et al. 2014, Eq. 4 of Metz et al. 2017.

    ``f = E[log D(x)] + E[log(1 - D(G(z)))]`` with ``D = sigmoid(logits)``: the generator minimises
    ``f`` and the discriminator ``-f``. The generator's loss keeps ``E[log D(x)]``: at ``theta_D^K``
    it depends on the generator.

    Example:
        >>> import torch, unroll
        >>> d = lambda x: x.sum(1)  # logits
        >>> fake, real = torch.zeros(4, 2), torch.zeros(4, 2)
        >>> unroll.Minimax().discriminator_loss(d, fake, real)  # 2 log 2
        tensor(1.3863)
    """

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``-f``."""
        real_loss = softplus(-_logits(discriminator, real)).mean()
        return real_loss + softplus(_logits(discriminator, fake)).mean()

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``f``."""
        return -self.discriminator_loss(discriminator, fake, real)


@dataclass(frozen=True)
class NonSaturating:
    """The minimax game with the generator's loss ``-E[log D(G(z))]`` (Goodfellow et al. 2014)."""

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``-E[log D(x)] - E[log(1 - D(G(z)))]``."""
        return Minimax().discriminator_loss(discriminator, fake, real)

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``-E[log D(G(z))]``."""
        return softplus(-_logits(discriminator, fake)).mean()


@dataclass(frozen=True)
class LeastSquares:
    """LSGAN (Mao et al. 2017, Eq. 9): targets 1 for real, 0 for fake, 1 for the generator."""

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[(D(x) - 1)^2] / 2 + E[D(G(z))^2] / 2``."""
        real_loss = (_logits(discriminator, real) - 1).square().mean()
        return (real_loss + _logits(discriminator, fake).square().mean()) / 2

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[(D(G(z)) - 1)^2] / 2``."""
        return (_logits(discriminator, fake) - 1).square().mean() / 2


@dataclass(frozen=True)
class Hinge:
    """The hinge game (Lim and Ye 2017; Miyato et al. 2018, Eq. 16-17)."""

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))]``."""
        real_loss = relu(1 - _logits(discriminator, real)).mean()
        return real_loss + relu(1 + _logits(discriminator, fake)).mean()

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``-E[D(G(z))]``."""
        return -_logits(discriminator, fake).mean()


@dataclass(frozen=True)
class Wasserstein:
    """WGAN (Arjovsky et al. 2017): keep D Lipschitz with ``project=`` or ``+ GradientPenalty``."""

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[D(G(z))] - E[D(x)]``."""
        real_score = _logits(discriminator, real).mean()
        return _logits(discriminator, fake).mean() - real_score

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``-E[D(G(z))]``."""
        return -_logits(discriminator, fake).mean()


@dataclass(frozen=True)
class RelativisticPairing:
    """RpGAN (Jolicoeur-Martineau 2018; Sun et al. 2020): real and fake compared in pairs.

    ``real`` and ``fake`` need equal batch sizes.
    """

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[-log sigmoid(D(x) - D(G(z)))]``."""
        return softplus(-self._margin(discriminator, fake, real)).mean()

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[-log sigmoid(D(G(z)) - D(x))]``."""
        return softplus(self._margin(discriminator, fake, real)).mean()

    def _margin(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        real_logits = _logits(discriminator, real)
        fake_logits = _logits(discriminator, fake)
        real_logits, fake_logits = _pair(real_logits, fake_logits, "RelativisticPairing")
        return real_logits - fake_logits


@dataclass(frozen=True)
class RelativisticAverage:
    """RaGAN (Jolicoeur-Martineau 2018): each side against the mean logit of the other."""

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``-E[log s(D(x) - E D(G(z)))] - E[log(1 - s(D(G(z)) - E D(x)))]``."""
        real_margin, fake_margin = self._margins(discriminator, fake, real)
        return softplus(-real_margin).mean() + softplus(fake_margin).mean()

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``-E[log s(D(G(z)) - E D(x))] - E[log(1 - s(D(x) - E D(G(z))))]``."""
        real_margin, fake_margin = self._margins(discriminator, fake, real)
        return softplus(-fake_margin).mean() + softplus(real_margin).mean()

    def _margins(
        self, discriminator: Discriminator, fake: Batch, real: Batch
    ) -> tuple[Tensor, Tensor]:
        real_logits = _logits(discriminator, real)
        fake_logits = _logits(discriminator, fake)
        return real_logits - fake_logits.mean(), fake_logits - real_logits.mean()


@dataclass(frozen=True)
class Criterion:
    """The game of a loop built on ``nn.BCELoss``, ``nn.BCEWithLogitsLoss`` or ``nn.MSELoss``.

    D's loss is ``weight * (loss_fn(D(real), real_label) + loss_fn(D(fake), fake_label))``, with
    ``D(real)`` called first; G's is ``loss_fn(D(fake), real_label)``.

    Args:
        loss_fn: ``loss_fn(output, target) -> 0-d tensor``; the target has the output's shape.
        real_label: Target for real samples (below 1 for label smoothing). Default 1.
        fake_label: Target for fake samples. Default 0.
        weight: Factor of D's loss, 0.5 for loops that average its two terms. Default 1.

    Example:
        >>> import torch, unroll
        >>> objective = unroll.Criterion(torch.nn.BCEWithLogitsLoss(), real_label=0.9)
        >>> objective.generator_loss(lambda x: x, torch.zeros(4), torch.zeros(4))
        tensor(0.6931)
    """

    loss_fn: Callable[[Tensor, Tensor], Tensor]
    real_label: float = 1.0
    fake_label: float = 0.0
    weight: float = 1.0

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``weight * (loss_fn(D(real), real_label) + loss_fn(D(fake), fake_label))``."""
        real_loss = self._against(_logits(discriminator, real), self.real_label)
        fake_loss = self._against(_logits(discriminator, fake), self.fake_label)
        return self.weight * (real_loss + fake_loss)

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``loss_fn(D(fake), real_label)``."""
        return self._against(_logits(discriminator, fake), self.real_label)

    def _against(self, output: Tensor, label: float) -> Tensor:
        return self.loss_fn(output, torch.full_like(output, label))


def _add(self: Objective, other: Objective) -> _Sum:
    return _Sum(self, other)


def _radd(self: Objective, other: Objective) -> _Sum:
    return _Sum(other, self)


@dataclass(frozen=True)
class _Sum:
    """Two objectives, or an objective and a penalty, added up."""

    first: Objective
    second: Objective

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        loss = self.first.discriminator_loss(discriminator, fake, real)
        return loss + self.second.discriminator_loss(discriminator, fake, real)

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        loss = self.first.generator_loss(discriminator, fake, real)
        return loss + self.second.generator_loss(discriminator, fake, real)

    __add__ = _add
    __radd__ = _radd


def _first_floating(batch: Batch, what: str) -> Tensor:
    for tensor in tensors(batch):
        if tensor.is_floating_point():
            return tensor
    raise TypeError(f"{what}: a gradient penalty needs a floating-point tensor to differentiate.")


def _squared_gradient_norm(discriminator: Discriminator, batch: Batch, x: Tensor) -> Tensor:
    """Return ``||dD/dx||^2`` per sample, where ``x`` takes the place of a tensor of the batch."""
    output = _logits(discriminator, batch)
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def _replace(batch: Batch, old: Tensor, new: Tensor) -> Batch:
    return map_tensors(lambda t: new if t is old else t, batch)


def _input_penalty(discriminator: Discriminator, batch: Batch, gamma: float, what: str) -> Tensor:
    x = _first_floating(batch, what)
    # A view, so that the derivative is the partial one even if x depends on others in the batch.
    point = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    norms = _squared_gradient_norm(discriminator, _replace(batch, x, point), point)
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
        x, y = _pair(
            _first_floating(real, "real"), _first_floating(fake, "fake"), "GradientPenalty"
        )
        share = torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        point = share * x + (1 - share) * y
        if not point.requires_grad:
            point.requires_grad_()
        norms = safe_sqrt(_squared_gradient_norm(discriminator, _replace(real, x, point), point))
        return self.weight * (norms - 1).square().mean()

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return zero: the penalty reaches the generator through theta_D^K alone."""
        return _zero(fake)

    __add__ = _add
    __radd__ = _radd


def _zero(batch: Batch) -> Tensor:
    return _first_floating(batch, "fake").new_zeros(())


def expects_logits(objective: Objective) -> bool:
    """Return whether an objective is one of those here that take logits."""
    if isinstance(objective, _Sum):
        return expects_logits(objective.first) or expects_logits(objective.second)
    return isinstance(
        objective,
        (
            Minimax,
            NonSaturating,
            LeastSquares,
            Hinge,
            Wasserstein,
            RelativisticPairing,
            RelativisticAverage,
        ),
    )
