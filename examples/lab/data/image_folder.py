"""Colour images in memory: CIFAR-10 and STL-10 by torchvision, or any folder of images."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lab.runs import write_atomically

SPLITS = ("train", "test")
BATCHES = "cifar-10-batches-py"  # what torchvision calls its copy of CIFAR-10
Sampler = Callable[[int, torch.Generator], Tensor]  # how many -> images of bytes


class Images(NamedTuple):
    """Pixels, `(N, 3, size, size)` in 0..255, and the class of every image."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]  # the folders that the images are in; one, "", where there are none
    name: str


def load(
    root: Path | None = None, *, split: str = "train", size: int = 32, cache: Path | None = None
) -> Images:
    """Return the images of a data set.

    Args:
        root: A folder of images, in folders by class or not, below `train` and `test` or not; or
            what holds torchvision's copy of CIFAR-10. Default: the folder that the environment
            variable `UNROLL_DATA` names if it has CIFAR-10, else `data`, with a download.
        split: "train" or "test".
        size: The side that images of another one are cropped and resized to.
        cache: Where decoded folders are kept. Default: `unroll-images` in the user's cache folder.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if root is None:
        shared = Path(os.environ.get("UNROLL_DATA", "data"))
        return _cifar10(shared if (shared / BATCHES).exists() else Path("data"), split, size)
    if not root.is_dir():
        raise FileNotFoundError(
            f"--data-root must be a folder of images, {root} is no folder: give another, or none "
            "for CIFAR-10 by torchvision"
        )
    if (root / BATCHES).exists():
        return _cifar10(root, split, size)
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return _folder(root, split, size, cache or caches / "unroll-images")


@cache
def stl10(size: int) -> Images:
    """Return STL-10's unlabelled images, resized: RS-GAN both trains and evaluates on them."""
    from torchvision.datasets import STL10  # slow to import
    from torchvision.transforms.functional import resize

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


def subset(pixels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return as many random images, or all: folders are in the order of their classes."""
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return pixels[order[:count]]


def _cifar10(root: Path, split: str, size: int) -> Images:
    from torchvision.datasets import CIFAR10  # slow to import

    try:
        found = CIFAR10(root, train=split == "train", download=not (root / BATCHES).exists())
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"CIFAR-10 is neither whole in {root} nor downloadable ({error}): give --data-root, "
            "a folder of images or one that has torchvision's copy"
        ) from error
    if size != found.data.shape[1]:
        pixels = np.stack([_fit(Image.fromarray(image), size) for image in found.data])
    else:
        pixels = found.data
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Images(channels_first, torch.tensor(found.targets), tuple(found.classes), "cifar10")


def _folder(root: Path, split: str, size: int, cache: Path) -> Images:
    from torchvision.datasets.folder import IMG_EXTENSIONS  # slow to import

    parts = [name for name in SPLITS if (root / name).is_dir()]
    if parts and split not in parts:
        raise FileNotFoundError(f"--data-root {root} has a folder {parts[0]}, but none for {split}")
    top = root / split if parts else root
    paths = sorted(p for p in top.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise FileNotFoundError(
            f"--data-root must be a folder of images ({', '.join(IMG_EXTENSIONS)}), "
            f"there is none in {top}"
        )
    names = [path.relative_to(top).parts for path in paths]
    own = [parts[0] if len(parts) > 1 else "" for parts in names]
    classes = tuple(sorted(set(own)))
    labels = torch.tensor([classes.index(name) for name in own])
    kept = cache / f"{root.resolve().name}-{split}-{size}-{_digest(paths)}.pt"
    return Images(_decoded(paths, size, kept), labels, classes, root.resolve().name)


def _digest(paths: Sequence[Path]) -> str:
    """Return a number that changes with the files."""
    files = hashlib.sha256()
    for path in paths:
        found = path.stat()
        files.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return files.hexdigest()[:16]


def _decoded(paths: Sequence[Path], size: int, kept: Path) -> Tensor:
    """Return the pixels, decoded once."""
    with suppress(OSError, EOFError, RuntimeError, UnpicklingError):  # none yet, or damaged
        decoded: Tensor = torch.load(kept, weights_only=True)
        return decoded
    stack = np.stack([_read(path, size) for path in paths])
    pixels = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()
    try:
        write_atomically(kept, lambda draft: torch.save(pixels, draft))
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        warnings.warn(f"the decoded images are not kept in {kept.parent}: {error}", stacklevel=2)
    return pixels


def _read(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return _fit(image.convert("RGB"), size)
    except OSError as error:
        raise ValueError(f"{path} is not a readable image ({error}): mend or remove it") from error


def _fit(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image if image.size == (size, size) else ImageOps.fit(image, (size, size)))
