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
            ax.text(steps[-1], level, name, ha="right", va="bottom", color="0.4")
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
        ax.hlines(data.numpy(), steps[0], steps[-1], color=REAL, linewidth=0.4, alpha=0.25)
        ax.plot(steps, torch.stack(list(moments)).numpy(), color=FAKE, linewidth=0.4, alpha=0.5)
        ax.set(title=label, xlabel="epochs", ylim=(-2, 6))
        _plain(ax)
    axes[0, 0].set_ylabel("data (red) and generated (blue)")
    save(figure, path)


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0)
