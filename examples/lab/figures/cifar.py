"""The figures of the training on CIFAR-10: samples for every K (Fig. 4), and loss curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from lab.data.pixels import as_floats
from lab.figures import pictures
from lab.figures.plots import save

LINES = {"d_loss": "D's loss", "f_0": "$f_0$", "f_K": "$f_K$"}


def samples(folder: Path, logs: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the last samples of a run of every K side by side, and those over training."""
    last = [as_floats(log["snapshots"][-1]) for log in logs.values()]
    pictures.grid(folder / "cifar10_samples.png", {"": last}, list(logs), across=8, width=2.2)
    first = next(iter(logs.values()))
    moments = pictures.spread(len(first["history"]), 4)
    rows = {
        label: [as_floats(log["snapshots"][i][:16]) for i in moments if i < len(log["snapshots"])]
        for label, log in logs.items()
    }
    titles = [f"{first['history'][i]['pairs']:,}" for i in moments]
    caption = "pairs of updates of G and D"
    pictures.grid(folder / "cifar10_training.png", rows, titles, caption=caption)


def losses(folder: Path, histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> None:
    """Draw a panel a K: thin lines are seeds, a thick one is their mean."""
    figure, axes = plt.subplots(
        1, len(histories), figsize=(2.4 * len(histories) + 0.6, 2.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, (label, seeds) in zip(axes[0], histories.items(), strict=True):
        shared = min(map(len, seeds))
        pairs = [row["pairs"] for row in seeds[0]][1:shared]
        for number, (column, name) in enumerate(LINES.items()):
            values = np.array([[row[column] for row in seed[1:shared]] for seed in seeds])
            ax.plot(pairs, values.T, color=f"C{number}", linewidth=0.5, alpha=0.4)
            ax.plot(pairs, values.mean(0), color=f"C{number}", linewidth=1.3, label=name)
        ax.set(title=label, xlabel="pairs of updates")
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0)
    axes[0, 0].set_ylabel("loss, averaged over ten pairs")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    save(figure, folder / "cifar10_losses.png")
