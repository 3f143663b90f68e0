"""The colours of coloured MNIST: given to digits, found again, and compared (3.3.2, App. F).

colours = colors.draw(64, rng)
images = colors.coloured(data.sample(64, rng), colours, rng)   # (64, 3, ...), in [-1, 1]
found = colors.foreground(images)                              # (n, 3), n <= 64
colors.js_divergence(found_in_data, found_in_samples)          # in nats
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEVIATION = 0.5  # of the colours
NOISE = 0.2  # of the pixels
LEAST = 2 * NOISE  # between the two clusters of a digit that is not just noise
CHUNK = 500  # images at a time: a few of their pixels' tensors are some MB


def draw(count: int, rng: torch.Generator) -> Tensor:
    """Return colours, `(count, 3)`, normal with mean 0."""
    return DEVIATION * torch.randn(count, 3, generator=rng, device=rng.device)


def coloured(digits: Tensor, colours: Tensor, rng: torch.Generator) -> Tensor:
    """Return grey digits `(N, 1, height, width)` in [-1, 1] as coloured ones, by App. F.

    With I the digit in [0, 1] and C its colour it is I * C + (I - 1), with noise at every pixel
    and channel, clipped to [-1, 1].
    """
    grey = (digits + 1) / 2
    images = grey * colours[:, :, None, None] + (grey - 1)
    noise = torch.randn(images.shape, generator=rng, device=rng.device)
    return images.add_(noise, alpha=NOISE).clamp_(-1, 1)


def foreground(images: Tensor) -> Tensor:
    """Return the colours of digits: of all those that can be told from the background.

    The pixels of each image are in two clusters, by k-means from black and the pixel farthest from
    it; the foreground's centre is the one farther from black. An image whose centres are closer
    than two deviations of the noise is discarded: its digit, if it has one, is as dark as that.
    """
    found = []
    for part in images.split(CHUNK):
        back, front = clusters(part.flatten(2).movedim(1, 2))
        found.append(front[(front - back).norm(dim=1) >= LEAST])
    return torch.cat(found)


def clusters(pixels: Tensor, *, most: int = 100) -> tuple[Tensor, Tensor]:
    """Return the two centres of each image's pixels, the one nearer to black first.

    Lloyd's algorithm, for all images at once.

    Args:
        pixels: `(images, pixels, 3)`.
        most: Iterations at most.
    """
    black = -torch.ones_like(pixels[:, 0])
    farthest = (pixels + 1).square().sum(2).argmax(1)
    one, two = black, pixels[torch.arange(len(pixels)), farthest]
    total, own = pixels.sum(1), None
    for _ in range(most):
        between = (two - one)[:, :, None]
        middle = (two.square() - one.square()).sum(1) / 2
        nearer = (pixels @ between).squeeze(2) > middle[:, None]
        if own is not None and torch.equal(nearer, own):
            break
        own = nearer
        weights = nearer.to(pixels.dtype)[:, None]
        count, inside = weights.sum(2), (weights @ pixels).squeeze(1)
        rest = pixels.shape[1] - count
        two = torch.where(count > 0, inside / count.clamp(min=1), two)
        one = torch.where(rest > 0, (total - inside) / rest.clamp(min=1), one)
    swapped = ((one + 1).norm(dim=1) > (two + 1).norm(dim=1))[:, None]
    return torch.where(swapped, two, one), torch.where(swapped, one, two)


def js_divergence(data: Tensor, model: Tensor, *, seed: int = 0) -> float:
    """Return the JS divergence between Gaussian kernel densities of two sets of colours, in nats.

    Both have the same kernel: the data's covariance times Scott's factor n^(-1/7), squared. (With a
    kernel of its own, a single colour would have no density.) The expectations are Monte Carlo,
    over as many draws from each density as there are colours of data.

    Args:
        data: `(n, 3)`.
        model: `(m, 3)`; without any colour, the divergence is ln 2, as far as it can be.
        seed: Of the draws.
    """
    if not len(model):
        return math.log(2)
    p, q = densities(data, model)
    count = len(data)
    divergence = 0.0
    for number, own in enumerate((p, q)):
        draws = own.sample(count, random_state=2 * seed + number)
        log_p, log_q = p.score_samples(draws), q.score_samples(draws)
        log_own = log_q if number else log_p
        divergence += float(np.mean(log_own - np.logaddexp(log_p, log_q) + math.log(2))) / 2
    return max(divergence, 0.0)  # the estimate may be below


def densities(data: Tensor, *others: Tensor) -> list[Any]:
    """Return kernel densities of colours, in coordinates that make the data's covariance I."""
    from sklearn.neighbors import KernelDensity  # slow to import

    points = [colours.detach().cpu().double().numpy() for colours in (data, *others)]
    root = np.linalg.cholesky(np.cov(points[0].T))
    factor = len(points[0]) ** (-1 / 7)
    whitened = [np.linalg.solve(root, colours.T).T for colours in points]
    return [KernelDensity(bandwidth=factor, rtol=1e-3).fit(colours) for colours in whitened]
