"""The figure of `stacked_mnist.py`: modes over training."""

from fractions import Fraction
from pathlib import Path

import matplotlib.pyplot as plt

from lab.figures.plots import save
from lab.verdicts import moments, read


def curves(record: Path, path: Path) -> None:
    """Draw modes and reverse KL against pairs from the record: a panel a size and metric."""
    every = read(record).query("preset == 'small' and networks == 'E'")
    sizes = sorted(every["size"].unique())
    figure, axes = plt.subplots(
        2, len(sizes), figsize=(3.6 * len(sizes) + 0.6, 4.6), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, metric in zip(axes, ("curve_modes", "curve_reverse_kl"), strict=True):
        for ax, size in zip(row, sizes, strict=True):
            for number, (k, own) in enumerate(every[every["size"] == size].groupby("unroll_steps")):
                points = own.groupby("pairs")[metric].apply(moments)
                y, errors = zip(*points, strict=True)
                label = f"K = {k}"
                ax.errorbar(points.index, y, errors, fmt=".-", color=f"C{number}", label=label)
            ax.spines[["top", "right"]].set_visible(False)
    for ax, size in zip(axes[0], sizes, strict=True):
        ax.set_title(f"D = {Fraction(size)}")
        ax.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("modes")
    axes[1, 0].set_ylabel("reverse KL, nats")
    for ax in axes[1]:
        ax.set(xlabel="pairs of updates", ylim=(0, None))
    axes[0, 0].legend()
    save(figure, path)
