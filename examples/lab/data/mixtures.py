"""Mixtures of Gaussians in the plane, and metrics of mode collapse."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

HIGH_QUALITY = 3.0  # within so many standard deviations of the nearest mode
CEILING = 100 * (1 - math.exp(-(HIGH_QUALITY**2) / 2))  # % high quality of perfect samples: 98.89

CURVES = {
    "modes": "modes captured",
    "percent_high_quality": "high-quality samples, HQ (%)",
    "reverse_kl_high_quality": "reverse KL, HQ samples (nats)",
    "reverse_kl_all": "reverse KL, all samples (nats)",
    "largest_mode": "largest mode (area: its share)",
    "largest_mode_share": "share of the largest mode",
}


@dataclass(frozen=True)
class Mixture:
    """A mixture of isotropic Gaussians in the plane."""

    means: Tensor
    deviation: float
    weights: Tensor

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """Return `count` independent points."""
        modes = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        noise = torch.randn(count, 2, generator=rng, device=rng.device)
        return self.means[modes] + self.deviation * noise


def ring(
    modes: int = 8,
    *,
    radius: float,
    deviation: float,
    weights: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> Mixture:
    """Return Gaussians equally spaced around a circle, at the distinct angles 2 pi i / modes."""
    angles = 2 * math.pi * torch.arange(modes, device=device) / modes
    share = torch.tensor(weights if weights is not None else [1 / modes] * modes, device=device)
    return Mixture(radius * torch.stack((angles.cos(), angles.sin()), dim=1), deviation, share)


def grid(
    side: int = 5, *, radius: float, deviation: float, device: str | torch.device = "cpu"
) -> Mixture:
    """Return Gaussians on a square grid that reaches from -radius to radius."""
    line = torch.linspace(-radius, radius, side, device=device)
    share = torch.full((side**2,), 1 / side**2, device=device)
    return Mixture(torch.cartesian_prod(line, line), deviation, share)


def mode_metrics(samples: Tensor, mixture: Mixture) -> dict[str, float]:
    """Compare samples with the modes of the mixture that they should follow.

    A sample belongs to its nearest mode; within three deviations it is of high quality (HQ).

    Returns:
        modes: Modes with at least one HQ sample (VEEGAN, PacGAN).
        modes_quarter_share: Modes with a quarter of their share or more, of HQ samples only.
        percent_high_quality: Percentage of HQ samples; `CEILING` for perfect ones.
        reverse_kl_high_quality: KL(generated || true) over modes, HQ samples alone (PacGAN).
        reverse_kl_all: The same with all samples, counted for their nearest modes
            (self-conditioned GAN).
        largest_mode, largest_mode_share: Where most samples are, and how many of them.
    """
    distances, nearest = torch.cdist(samples, mixture.means).min(dim=1)
    good = nearest[distances < HIGH_QUALITY * mixture.deviation]
    counts = torch.bincount(nearest, minlength=len(mixture.means))
    good_counts = torch.bincount(good, minlength=len(mixture.means))
    quarter = mixture.weights * len(samples) / 4
    return {
        "modes": int((good_counts > 0).sum()),
        "modes_quarter_share": int((good_counts >= quarter).sum()),
        "percent_high_quality": 100 * len(good) / len(samples),
        "reverse_kl_high_quality": _kl(good_counts, mixture.weights),
        "reverse_kl_all": _kl(counts, mixture.weights),
        "largest_mode": int(counts.argmax()),
        "largest_mode_share": counts.max().item() / len(samples),
    }


def rotation(history: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Count moves of the mass from mode to mode over the `mode_metrics` of a run.

    Returns:
        largest_mode_changes: How often the largest mode changed, ties included.
        rotations: The same over the moments at which it held more than half of the samples: none
            for a generator that has spread out, many for one that collapses to mode after mode.
    """
    largest = [row["largest_mode"] for row in history]
    dominant = [row["largest_mode"] for row in history if row["largest_mode_share"] > 0.5]
    return {"largest_mode_changes": _changes(largest), "rotations": _changes(dominant)}


def _changes(series: Sequence[float]) -> int:
    return sum(before != after for before, after in pairwise(series))


def _kl(counts: Tensor, weights: Tensor) -> float:
    """Return KL(counts / sum || weights) in nats; NaN where nothing was counted."""
    share = counts.double() / counts.sum()
    return (torch.xlogy(share, share) - torch.xlogy(share, weights.double())).sum().item()
