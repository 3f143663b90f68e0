"""Figs. 5 and 6 and Appendix G: reconstructions of training images, and distances of samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from lab.figures.plots import save
from lab.metrics import distances as measures

ROWS = 8  # images below each other, as in Fig. 5
BLOCKS = 3  # of Fig. 5's layout beside each other, as in App. G


def most_different(low: Tensor, high: Tensor, count: int) -> list[int]:
    """Return where two errors differ most as a fraction of the second, the largest first."""
    fraction = ((low - high) / high).abs()
    found: list[int] = fraction.argsort(descending=True)[:count].tolist()
    return found


def reconstructions(
    folder: Path, seed: int, targets: Tensor, results: Mapping[int, Mapping[str, Any]]
) -> None:
    """Draw the images whose errors differ most between the fewest and the most steps."""
    ks = sorted(results)
    chosen = most_different(results[ks[0]]["mse"], results[ks[-1]]["mse"], ROWS * BLOCKS)
    wide = len(ks) + 1
    figure, axes = plt.subplots(
        ROWS, wide * BLOCKS, figsize=(0.62 * wide * BLOCKS, 0.78 * ROWS + 0.5), squeeze=False
    )
    figure.subplots_adjust(0.01, 0.03, 0.99, 0.95, wspace=0.08, hspace=0.28)
    for ax in axes.flat:
        ax.axis("off")
    for place, image in enumerate(chosen):
        block, row = divmod(place, ROWS)
        cells = axes[row, block * wide : (block + 1) * wide]
        _show(cells[0], targets[image], "")
        for ax, k in zip(cells[1:], ks, strict=True):
            _show(ax, results[k]["images"][image], f"{results[k]['mse'][image]:.4f}")
    for block in range(BLOCKS):
        titles = ["data", *(f"{k} step{'s' * (k != 1)}" for k in ks)]
        for ax, title in zip(axes[0, block * wide : (block + 1) * wide], titles, strict=True):
            ax.set_title(title, fontsize=8)
    save(figure, folder / f"cifar10_reconstructions_seed{seed}.png")


def distances(folder: Path, real: Tensor, found: Mapping[tuple[int, int], Tensor]) -> None:
    """Draw a panel a K: the data in red, seeds in blue, medians as vertical lines."""
    ks = sorted({k for k, _ in found})
    edges, densities = measures.histograms([real, *found.values()])
    centres = (edges[1:] + edges[:-1]) / 2
    figure, axes = plt.subplots(
        len(ks), 1, figsize=(5.5, 1.5 * len(ks) + 0.4), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, k in zip(axes[:, 0], ks, strict=True):
        lines = [("tab:red", 1.4, real, densities[0])]
        for (own, _), sample, density in zip(found, found.values(), densities[1:], strict=True):
            if own == k:
                lines.append(("tab:blue", 0.8, sample, density))
        for colour, width, sample, density in lines:
            ax.plot(centres, density, color=colour, linewidth=width)
            middle = torch.median(sample).item()
            ax.axvline(middle, color=colour, linewidth=width, linestyle="--", alpha=0.7)
        ax.set(ylabel="density", title=f"{k} step{'s' * (k != 1)}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0)
    axes[0, 0].set(xlim=(0, None), ylim=(0, None))  # shared by all
    axes[-1, 0].set_xlabel("$\\ell_2$ distance of a pair, pixels in [-1, 1]")
    save(figure, folder / "cifar10_distances.png")


def _show(ax: Axes, image: Tensor, text: str) -> None:
    ax.imshow(image.movedim(0, -1).numpy(), interpolation="nearest")
    ax.text(0.5, -0.03, text, transform=ax.transAxes, ha="center", va="top", fontsize=6.5)
