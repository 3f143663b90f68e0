"""Grids of generated images as PNG, grey or RGB.

Images are `(N, 1 or 3, height, width)`, floats in [-1, 1] as a generator makes them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from lab.figures.plots import save
from lab.runs import write_atomically


def tile(images: Tensor, columns: int = 8, *, padding: int = 1) -> Tensor:
    """Return one image `(3, height, width)` in [0, 1] of all, row by row, on white."""
    unit = images.detach().float().cpu().add(1).div(2).clamp(0, 1)
    return make_grid(unit, nrow=columns, padding=padding, pad_value=1.0)


def write(path: Path, images: Tensor, columns: int = 8) -> None:
    """Write the images as one, pixel by pixel."""
    write_atomically(path, partial(save_image, tile(images, columns), format="png"))


def grid(
    path: Path,
    rows: Mapping[str, Sequence[Tensor]],
    columns: Sequence[str],
    *,
    caption: str = "",
    across: int = 4,
    width: float = 1.3,
) -> None:
    """Draw a row a setting and a column a training step, every cell a tile of images."""
    tiles = {name: [tile(images, across) for images in cells] for name, cells in rows.items()}
    shapes = [cell.shape for cells in tiles.values() for cell in cells]
    aspect = max(height / breadth for _, height, breadth in shapes)
    size = width * len(columns) + 0.4, width * aspect * len(rows) + 0.5
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    for row, (name, cells) in zip(axes, tiles.items(), strict=True):
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(name)
        for ax, cell in zip(row, cells, strict=False):
            ax.imshow(cell.movedim(0, -1).numpy(), interpolation="nearest")
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title)
    if caption:
        figure.supxlabel(caption, fontsize=9)
    save(figure, path)


def spread(count: int, columns: int) -> list[int]:
    """Return which of `count` moments to show in at most `columns`: first, last, evenly between."""
    return torch.linspace(0, count - 1, min(columns, count)).round().int().tolist()
