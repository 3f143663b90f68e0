"""Figures of games on a line: losses, where every sample goes, and D as a function."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from lab.figures.plots import save

REAL, FAKE = "C3", "C0"


def panels(
    path: Path,
    steps: Sequence[int],
    values: Mapping[str, Sequence[Sequence[float]]],
    levels: Mapping[str, Mapping[str, float]],
    ylabel: str,
) -> None:
    """Plot a panel a setting: a thin line a seed, and dashed levels with their names."""
    figure, axes = plt.subplots(
        1, len(values), figsize=(2.6 * len(values) + 0.4, 2.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, (label, seeds) in zip(axes[0], values.items(), strict=True):
        for name, level in levels[label].items():
            ax.axhline(level, color="0.5", linestyle="--", linewidth=1)
            ax.annotate(
                name,
                (steps[-1], level),
                (0, 2),
                textcoords="offset points",
                ha="right",
                color="0.4",
            )
        ax.plot(steps, np.array(seeds).T, color=FAKE, linewidth=0.6, alpha=0.6)
        ax.set(title=label, xlabel="epochs", ylim=(0, 1))
        _plain(ax)
    axes[0, 0].set_ylabel(ylabel)
    save(figure, path)


def paths(
    path: Path, steps: Sequence[int], fakes: Mapping[str, Sequence[Tensor]], data: Tensor
) -> None:
    """Plot a panel a setting: where each generated sample is over training, and the data."""
    figure, axes = plt.subplots(
        1, len(fakes), figsize=(2.6 * len(fakes) + 0.4, 2.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, (label, moments) in zip(axes[0], fakes.items(), strict=True):
        ax.hlines(data, steps[0], steps[-1], color=REAL, linewidth=0.4, alpha=0.25)
        ax.plot(steps, torch.stack(list(moments)).numpy(), color=FAKE, linewidth=0.4, alpha=0.5)
        ax.set(title=label, xlabel="epochs", ylim=(-2, 6))
        _plain(ax)
    axes[0, 0].set_ylabel("data (red) and generated (blue)")
    save(figure, path)


def functions(
    path: Path,
    grid: Tensor,
    curves: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    titles: Sequence[str],
    data: Tensor,
) -> None:
    """Draw D's logit on a grid, a row a setting and a column a moment, with the samples on it.

    Args:
        path: Where to.
        grid: The points on the line.
        curves: For each setting and moment, D on the grid and the generated samples.
        titles: Of the moments.
        data: The real samples.
    """
    shape = len(curves), len(titles)
    size = 1.5 * shape[1] + 0.5, 1.3 * shape[0] + 0.4
    figure, axes = plt.subplots(
        *shape, figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for row, (label, moments) in zip(axes, curves.items(), strict=True):
        row[0].set_ylabel(label.replace(", ", "\n"))
        for ax, (values, fake) in zip(row, moments, strict=True):
            ax.axhline(0, color="0.8", linewidth=0.8)
            ax.plot(grid, values, color="0.2", linewidth=1)
            for points, color in ((data, REAL), (fake, FAKE)):
                ax.plot(
                    points, _at(points, grid, values), ".", color=color, markersize=3, alpha=0.4
                )
            ax.set_xlim(grid[0].item(), grid[-1].item())
            _plain(ax)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    figure.supxlabel("D's logit; real samples red, generated ones blue", fontsize=9)
    save(figure, path)


def _at(points: Tensor, grid: Tensor, values: Tensor) -> np.ndarray:
    return np.interp(points.numpy(), grid.numpy(), values.numpy())


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0)
