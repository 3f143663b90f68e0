"""STL-10's unlabelled images, by torchvision."""

import os
from functools import cache
from pathlib import Path

import torch
from torchvision.datasets import STL10
from torchvision.transforms.functional import resize

from lab.data.image_folder import Images


@cache
def load(size: int) -> Images:
    """Return 100,000 images, resized; they have no test split, and RS-GAN evaluates on them too.

    Args:
        size: The side of an image.
    """
    root = Path(os.environ.get("UNROLL_DATA", "data"))
    root = root if (root / STL10.base_folder).exists() else Path("data")
    try:
        found = STL10(root, split="unlabeled", download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"STL-10 is neither whole in {root} nor downloadable ({error}): give --data-root, a "
            "folder of images"
        ) from error
    parts = torch.from_numpy(found.data).split(1000)
    pixels = torch.cat([resize(part, [size, size]) for part in parts])
    return Images(pixels, torch.zeros(len(pixels), dtype=torch.long), ("",), "stl10")
