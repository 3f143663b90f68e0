"""The game: what the discriminator and the generator minimise.

Every objective here is a small frozen dataclass with the two methods of :class:`Objective`; one of
your own needs the same two methods and no base class. Unless said otherwise the discriminator
returns logits of any shape, over which the losses average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.functional import softplus as _softplus

from unroll._functional import Batch, FunctionalDiscriminator

Discriminator = Callable[..., Any]  # with a batch, or with what D takes

# PyTorch's default threshold of 20 is off by 2e-9 there, above 40 the identity is exact.
softplus = partial(_softplus, threshold=40.0)


class Objective(Protocol):
    """A game between a discriminator and a generator: two losses, each to be minimised.

    ``discriminator`` is D at some theta_D^k and can be used as D is, its methods, submodules and
    ``parameters()`` included. Called with a batch as it was given to the loss (a tensor, a tuple or
    a mapping), it unpacks it; ``discriminator.forward`` never does. An objective must not detach
    ``fake``: the second term of Eq. 12 flows through it.

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


@dataclass(frozen=True)
class Losses:
    """A game given as two functions, each of ``(discriminator, fake, real)``.

    Args:
        discriminator_loss: Returns what the discriminator minimises, a 0-d tensor.
        generator_loss: Returns what the generator minimises, a 0-d tensor.

    Example:
        >>> import torch, unroll
        >>> game = unroll.Losses(
        ...     lambda d, fake, real: d(fake).mean() - d(real).mean(),
        ...     lambda d, fake, real: -d(fake).mean(),
        ... )
        >>> game.generator_loss(lambda x: x, torch.ones(4), torch.zeros(4))
        tensor(-1.)
    """

    discriminator_loss: Callable[[Discriminator, Batch, Batch], Tensor]
    generator_loss: Callable[[Discriminator, Batch, Batch], Tensor]


def one_tensor(discriminator: Discriminator, batch: Batch) -> Tensor:
    """Return D's output, which must be a tensor; D may be the module itself, in its own step."""
    itself = isinstance(discriminator, nn.Module)
    output = (FunctionalDiscriminator(discriminator) if itself else discriminator)(batch)
    if not isinstance(output, Tensor):
        raise TypeError(
            "objective: needs a discriminator that returns one tensor; this one returned "
            f"{type(output).__name__}. Pass an objective of your own that combines the outputs "
            "(two methods, see unroll.Objective)."
        )
    return output


def paired(real: Tensor, fake: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return both tensors, which must have the same shape."""
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
        real_loss = softplus(-one_tensor(discriminator, real)).mean()
        return real_loss + softplus(one_tensor(discriminator, fake)).mean()

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
        return softplus(-one_tensor(discriminator, fake)).mean()


@dataclass(frozen=True)
class LeastSquares:
    """LSGAN (Mao et al. 2017, Eq. 9): targets 1 for real, 0 for fake, 1 for the generator."""

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[(D(x) - 1)^2] / 2 + E[D(G(z))^2] / 2``."""
        real_loss = (one_tensor(discriminator, real) - 1).square().mean()
        return (real_loss + one_tensor(discriminator, fake).square().mean()) / 2

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[(D(G(z)) - 1)^2] / 2``."""
        return (one_tensor(discriminator, fake) - 1).square().mean() / 2


@dataclass(frozen=True)
class Hinge:
    """The hinge game (Lim and Ye 2017; Miyato et al. 2018, Eq. 16-17)."""

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))]``."""
        real_loss = relu(1 - one_tensor(discriminator, real)).mean()
        return real_loss + relu(1 + one_tensor(discriminator, fake)).mean()

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``-E[D(G(z))]``."""
        return -one_tensor(discriminator, fake).mean()


@dataclass(frozen=True)
class Wasserstein:
    """WGAN (Arjovsky et al. 2017): keep D Lipschitz with ``project=`` or ``+ GradientPenalty``."""

    def discriminator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``E[D(G(z))] - E[D(x)]``."""
        real_score = one_tensor(discriminator, real).mean()
        return one_tensor(discriminator, fake).mean() - real_score

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``-E[D(G(z))]``."""
        return -one_tensor(discriminator, fake).mean()


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
        real_logits = one_tensor(discriminator, real)
        fake_logits = one_tensor(discriminator, fake)
        real_logits, fake_logits = paired(real_logits, fake_logits, "RelativisticPairing")
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
        real_logits = one_tensor(discriminator, real)
        fake_logits = one_tensor(discriminator, fake)
        return real_logits - fake_logits.mean(), fake_logits - real_logits.mean()


ON_LOGITS = (
    *(Minimax, NonSaturating, LeastSquares, Hinge, Wasserstein),
    *(RelativisticPairing, RelativisticAverage),
)


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
        real_loss = self._against(one_tensor(discriminator, real), self.real_label)
        fake_loss = self._against(one_tensor(discriminator, fake), self.fake_label)
        return self.weight * (real_loss + fake_loss)

    def generator_loss(self, discriminator: Discriminator, fake: Batch, real: Batch) -> Tensor:
        """Return ``loss_fn(D(fake), real_label)``."""
        return self._against(one_tensor(discriminator, fake), self.real_label)

    def _against(self, output: Tensor, label: float) -> Tensor:
        return self.loss_fn(output, torch.full_like(output, label))
