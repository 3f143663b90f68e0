"""What a generator of images makes, and whether its training still does."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

AT_ONCE = 500  # images normalised as one batch, as in the evaluation of RS-GAN's code
Sampler = Callable[[int, torch.Generator], Tensor]  # how many -> images of bytes


@torch.no_grad()
def sample(generator: nn.Module, noise: Tensor) -> Tensor:
    """Return images in [-1, 1], normalised over batches, and leave the generator as it was."""
    own = copy.deepcopy(generator).train()
    return torch.cat([own(part) for part in noise.split(AT_ONCE)])


def as_bytes(images: Tensor) -> Tensor:
    """Return images of [-1, 1] as a picture file has them."""
    return (127.5 * images + 127.5).round().clamp(0, 255).byte()


def check_finite(pair: int, loss: Tensor, discriminator: nn.Module, checkpoint: Path) -> None:
    """Stop a training whose numbers are no longer finite, before they are saved."""
    # A generator that has left the finite numbers shows in the loss of D's step after it.
    if loss.isfinite() and all(p.isfinite().all() for p in discriminator.parameters()):
        return
    raise FloatingPointError(
        f"the numbers of pair {pair:,} are not finite (D's loss is {loss.item()}). {checkpoint} is "
        "of an earlier pair and finite, if there is one: lower the learning rates and begin anew"
    )


def subset(pixels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return as many random images, or all: folders are in the order of their classes."""
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return pixels[order[:count]]
