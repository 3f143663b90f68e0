"""Figures in the layout of the paper: rows are settings, columns are training steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from lab.runs import write_atomically

PIXELS = 160
COUNTS = {"modes", "largest_mode"}
plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.frameon": False})


def density(samples: Tensor, extent: float) -> Tensor:
    """Return a Gaussian kernel density estimate on a fixed grid over [-extent, extent]^2.

    The kernel is a product over coordinates, which makes the estimate a product of two matrices.
    """
    grid = torch.linspace(-extent, extent, PIXELS)
    bandwidth = extent / 40
    squares = ((samples[:, :, None] - grid) / bandwidth) ** 2
    x, y = torch.exp(-squares.clamp(max=80) / 2).unbind(1)  # no denormals: they are slow
    return y.T @ x / (len(samples) * 2 * math.pi * bandwidth**2)


def spread(count: int, most: int) -> list[int]:
    """Return which of `count` moments to show: at most so many, from the first to the last."""
    found: list[int] = np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()
    return found


def grid(
    path: Path,
    rows: Mapping[str, Sequence[Any]],
    columns: Sequence[str],
    draw: Callable[[Axes, Any], object],
    *,
    size: tuple[float, float],
    caption: str,
) -> None:
    """Draw a row for each setting and a column for each moment of training; `draw` fills a cell."""
    shape = len(rows), len(columns)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for row, (label, cells) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label)
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, cell in zip(row, cells, strict=False):
            draw(ax, cell)
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title)
    figure.supxlabel(caption, fontsize=9)
    save(figure, path)


def heat_maps(
    path: Path,
    rows: Mapping[str, Sequence[Tensor]],
    columns: Sequence[str],
    data: Tensor,
    *,
    extent: float,
    caption: str,
) -> None:
    """Draw one row of heat maps a setting and, in the last column, the data; all on one scale."""
    show = partial(_show, extent=extent, peak=density(data, extent).max().item())
    whole = {label: [*snapshots, data] for label, snapshots in rows.items()}
    size = 1.1 * len(columns) + 1.4, 1.1 * len(rows) + 0.5
    grid(path, whole, [*columns, "data"], show, size=size, caption=caption)


def animation(
    path: Path,
    rows: Mapping[str, Sequence[Tensor]],
    titles: Sequence[str],
    data: Tensor,
    *,
    extent: float,
    frames: int = 50,
) -> None:
    """Animate the heat maps of all settings side by side, the data last."""
    peak = density(data, extent).max().item()
    size = 2.6 * (len(rows) + 1), 3.1
    figure, axes = plt.subplots(1, len(rows) + 1, figsize=size, dpi=80, layout="constrained")
    cells = []
    for ax, (label, snapshots) in zip(axes, [*rows.items(), ("data", [data])], strict=True):
        ax.set_title(label)
        cells.append(_show(ax, snapshots[0], extent, peak))
    figure.suptitle(titles[0])
    figure.canvas.draw()
    figure.set_layout_engine("none")  # laid out once, not in every frame
    movie, moments = [], spread(len(titles), frames)
    for moment in moments:
        figure.suptitle(titles[moment])
        for cell, snapshots in zip(cells, rows.values(), strict=False):
            cell.set_data(density(snapshots[moment], extent).numpy())
        figure.canvas.draw()
        movie.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    times = [125] * (len(movie) - 1) + [1125]  # milliseconds
    how = {"format": "gif", "save_all": True, "append_images": movie[1:], "loop": 0}
    write_atomically(path, partial(movie[0].save, duration=times, **how))
    plt.close(figure)


def curves(
    path: Path,
    frame: pd.DataFrame,
    metrics: Mapping[str, str],
    *,
    x: str = "pairs",
    ideal: Mapping[str, float],
) -> None:
    """Plot metrics over training: thin lines are seeds, a thick one is their mean.

    The largest mode is shown for the first seed, as dots whose area is its share of the samples.
    """
    figure, axes = plt.subplots(2, -(-len(metrics) // 2), figsize=(9, 5), layout="constrained")
    for ax in axes.flat[len(metrics) :]:
        ax.set_visible(False)
    for ax, (metric, label) in zip(axes.flat, metrics.items(), strict=False):
        if metric in ideal:
            ax.axhline(ideal[metric], color="0.6", linestyle="--", linewidth=1)
        for number, (name, own) in enumerate(frame.groupby("setting", sort=False)):
            color = f"C{number}"
            if metric == "largest_mode":
                first = own[own["seed"] == own["seed"].min()]
                areas = 20 * first["largest_mode_share"]
                ax.scatter(first[x], first[metric], areas, color, linewidths=0, clip_on=False)
                continue
            values = own.pivot(index=x, columns="seed", values=metric).astype(float)
            if values.shape[1] > 1:
                ax.plot(values, color=color, linewidth=0.5, alpha=0.4)
            mean = values.mean(axis=1, skipna=False)  # as far as all of them reach
            style = ".-" if number < 10 else ".--"  # there are ten colours
            ax.plot(mean, style, color=color, markersize=2, linewidth=1.2, label=name)
        ax.set(xlabel=x.replace("_", " "), ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        if metric in COUNTS:
            ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 5))
    save(figure, path)


def _show(ax: Axes, samples: Tensor, extent: float, peak: float) -> AxesImage:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color="0.8")
    box = (-extent, extent, -extent, extent)
    norm = PowerNorm(0.5, 0, peak, clip=True)
    return ax.imshow(density(samples, extent).numpy(), "Greens", norm, origin="lower", extent=box)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG of 256 colours, a third of the size, and forget it."""

    def draw_up(draft: Path) -> None:
        figure.savefig(draft, dpi=110, format="png")
        with Image.open(draft) as image:
            small = image.convert("RGB").quantize(256)
        small.save(draft, format="png", optimize=True)

    write_atomically(path, draw_up)
    plt.close(figure)
