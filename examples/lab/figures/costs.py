"""What a metric costs: a figure of settings in the plane of seconds and metric."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from lab.columns import moments
from lab.figures.plots import save

Point = tuple[float, Sequence[float]]  # seconds, and the metric of every seed


def chart(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    *,
    seconds: str,
    metric: str,
    hollow: bool = False,
) -> None:
    """Draw a panel a data set and a line a method.

    Args:
        path: Where to.
        panels: For each data set and method, its points.
        seconds: What the horizontal axis says.
        metric: What the vertical one says.
        hollow: Whether the first point of a line, without looking ahead, is.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels) + 1.5, 3.2), squeeze=False, layout="constrained"
    )
    for ax, (data, methods) in zip(axes[0], panels.items(), strict=True):
        for number, (method, points) in enumerate(methods.items()):
            x = [point[0] for point in points]
            y, errors = zip(*(moments(point[1]) for point in points), strict=True)
            color = f"C{number}"
            ax.errorbar(x, y, errors, color=color, linewidth=1, alpha=0.7)
            ax.plot(x, y, "o", color=color, label=method)
            if hollow:
                ax.plot(x[:1], y[:1], "o", color="white", markersize=3.5)
        ax.set(title=data, xscale="log", xlabel=seconds)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(metric)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    save(figure, path)
