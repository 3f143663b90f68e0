"""Distances of random pairs of images, Section 3.4.2: histograms, and how far apart they are."""

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor


def pairwise(images: Tensor, pairs: int, rng: torch.Generator, *, batch_size: int = 1000) -> Tensor:
    """Return the l2 distances of random pairs of different images."""
    if len(images) < 2:
        raise ValueError(f"images must be two or more, got {len(images)}")
    first = torch.randint(len(images), (pairs,), generator=rng)
    second = (first + torch.randint(1, len(images), (pairs,), generator=rng)) % len(images)
    scale = 127.5 if images.dtype == torch.uint8 else 1.0
    parts = [
        (images[i].float() - images[j].float()).flatten(1).norm(dim=1).cpu() / scale
        for i, j in zip(first.split(batch_size), second.split(batch_size), strict=True)
    ]
    return torch.cat(parts)


def wasserstein(distances: Tensor, others: Tensor) -> float:
    """Return the Wasserstein-1 distance of two samples of distances."""
    return float(wasserstein_distance(distances.numpy(), others.numpy()))


def histograms(samples: list[Tensor], bins: int = 120) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return shared edges of bins, and the density of every sample in them."""
    edges = np.histogram_bin_edges(torch.cat(samples).numpy(), bins)
    return edges, [np.histogram(sample.numpy(), edges, density=True)[0] for sample in samples]
