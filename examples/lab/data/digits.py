"""MNIST as tensors in memory: single digits, and three of them stacked as an RGB image.

data = digits.mnist(options.data_root, size=28)
batch = data.sample(64, rng)      # (64, 1, 28, 28), floats in [-1, 1]
stacks = data.stacks(64, rng)     # (64, 3, 28, 28): section 3.3.1 of the paper
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lab.data.pixels import as_floats

CLASSES = 10
SIZES = 28, 32  # as scanned, and with two black pixels around


@dataclass(frozen=True)
class Digits:
    """Images and their labels."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: str | torch.device) -> "Digits":
        return Digits(self.images.to(device), self.labels.to(device))

    def at(self, index: Tensor | slice) -> Tensor:
        return as_floats(self.images[index])

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """Return random images, `(count, 1, size, size)`."""
        return self.at(self._random((count,), rng))

    def stacks(self, count: int, rng: torch.Generator) -> Tensor:
        """Return random images with an independent digit in each channel, `(count, 3, ...)`."""
        return self.at(self._random((count, 3), rng)).squeeze(2)

    def _random(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        return torch.randint(len(self), shape, generator=rng, device=rng.device)


def mnist(root: Path | None = None, *, train: bool = True, size: int = 28) -> Digits:
    """Return the training or the test digits of MNIST, from `root` or from $UNROLL_DATA.

    Without either they are in `data/`, to which they are downloaded.
    """
    from torchvision.datasets import MNIST  # slow to import

    if size not in SIZES:
        raise ValueError(f"size must be one of {SIZES}, got {size}")
    given = root or os.environ.get("UNROLL_DATA")
    folder = Path(given or "data")
    raw = folder / "MNIST" / "raw"
    try:
        data = MNIST(str(folder), train=train, download=not given)
        images, labels = data.data, data.targets
        _check(images, labels)
    except Exception as error:  # torchvision has one of its own for every way to be wrong
        if given and not any(raw.glob("*-ubyte*")):
            raise FileNotFoundError(
                f"--data-root (or UNROLL_DATA) must be a folder with MNIST/raw in it, got {folder}:"
                " give another folder, or neither, to download MNIST to data/"
            ) from error
        raise RuntimeError(
            f"MNIST in {raw} cannot be read ({error}): it is incomplete or damaged, or the "
            "download failed; delete the folder and try again, or give a --data-root that has it"
        ) from error
    padded = functional.pad(images.unsqueeze(1), [(size - 28) // 2] * 4)
    return Digits(padded, labels)


def _check(images: Tensor, labels: Tensor) -> None:
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or not len(labels):
        raise ValueError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}")
