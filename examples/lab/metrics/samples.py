"""Images as they are evaluated: a generator's, and a random part of a data set's."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

AT_ONCE = 500  # images normalised as one batch, as in the evaluation of RS-GAN's code
Sampler = Callable[[int, torch.Generator], Tensor]  # how many -> images of bytes


@torch.no_grad()
def sample(generator: nn.Module, noise: Tensor) -> Tensor:
    """Return images in [-1, 1], normalised over batches, and leave the generator as it was."""
    own = copy.deepcopy(generator).train()
    return torch.cat([own(part) for part in noise.split(AT_ONCE)])


def subset(pixels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return as many random images, or all: folders are in the order of their classes."""
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return pixels[order[:count]]
