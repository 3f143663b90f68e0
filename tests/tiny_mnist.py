"""A few made-up digits in MNIST's files, and a classifier of them, for tests without downloads."""

from pathlib import Path

import numpy as np


def write(folder: Path, count: int = 60) -> Path:
    """Write digits by turns, a bar at the digit's height in each, and return the folder."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = np.arange(count) % 10
    images = np.zeros((count, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[2 + 2 * label : 5 + 2 * label, 4:24] = 255
    for part in ("train", "t10k"):
        _idx(raw / f"{part}-images-idx3-ubyte", images)
        _idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return folder


def _idx(path: Path, values: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> None:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(head + values.astype(np.uint8).tobytes())
