"""The figures of `colored_mnist.py`: Fig. App.5, the colours themselves, and Table 2 as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from lab import records, runs
from lab.data import colors, digits
from lab.data.pixels import as_bytes, as_floats
from lab.figures import pictures, plots
from lab.verdicts import moments

TABLE = {
    "js_divergence": "JS, nats",
    "js_floor": "floor",
    "js_single_colour": "one colour",
    "discarded": "discarded",
    "discarded_data": "of data",
    "colour_variance": "variance",
}


class Run(Protocol):
    """What a run is known by."""

    preset: str
    size: str
    unroll_steps: int
    seed: int

    @property
    def label(self) -> str:
        """Return the name of its setting."""
        ...

    def checkpoint(self, folder: Path) -> Path:
        """Return where it is kept."""
        ...


def report(out: Path, folder: Path, configs: Sequence[Run], data_root: Path | None = None) -> None:
    """Write the time series and the figures of some runs, and print the table."""
    first = configs[0]
    histories: dict[str, list[Any]] = {}
    ends: dict[tuple[str, int], list[float]] = {}
    floors: list[float] = []
    snapshots: dict[str, dict[str, Mapping[str, Tensor]]] = {}
    series = []
    for config in configs:
        log = runs.read_log(config.checkpoint(out))
        history = log["history"]
        histories.setdefault(config.label, []).append(history)
        ends.setdefault((config.size, config.unroll_steps), []).append(history[-1]["js_divergence"])
        floors.append(history[-1]["js_floor"])
        row = snapshots.setdefault(f"X = {config.size}", {})
        row.setdefault(f"K = {config.unroll_steps}", log["snapshots"][-1])
        run = {"size": config.size, "unroll_steps": config.unroll_steps, "seed": config.seed}
        series += [run | row for row in history]
    records.write(out / "metrics.csv", series)
    print(records.table(histories, TABLE))

    rng = torch.Generator().manual_seed(first.seed)
    drawn = colors.draw(1000, rng)
    images = colors.coloured(digits.mnist(data_root, size=32).sample(1000, rng), drawn, rng)
    of_data = {"images": as_bytes(images[:16]), "colours": colors.foreground(images)}
    rows = {x: {"data": of_data} | row for x, row in snapshots.items()}
    columns = list(max(rows.values(), key=len))
    scatter(folder / "colored_mnist_colours.png", rows, columns)
    pictures.grid(
        folder / "colored_mnist_samples.png",
        {x: [as_floats(row[k]["images"]) for k in columns if k in row] for x, row in rows.items()},
        columns,
        caption=f"samples at the end (preset {first.preset}, seed {first.seed})",
    )
    divergences(folder / "colored_mnist_js.png", ends, sum(floors) / len(floors))
    print(f"\nTime series, settings and checkpoints are in {out}/, figures in {folder}/")


def scatter(
    path: Path,
    rows: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    columns: Sequence[str],
) -> None:
    """Draw the colours found in samples and data by red and green, each in its own colour."""
    shape = len(rows), len(columns)
    size = 1.5 * shape[1] + 0.4, 1.5 * shape[0] + 0.5
    figure, axes = plt.subplots(
        *shape, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey=True
    )
    for line, (x, row) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(x)
        for ax, column in zip(line, columns, strict=True):
            if column in row:
                _dots(ax, row[column]["colours"])
            else:
                ax.set_visible(False)
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title)
    figure.supxlabel("red and green of the colours found, from -1 to 1", fontsize=9)
    plots.save(figure, path)


def _dots(ax: Axes, colours: Tensor) -> None:
    shown = colours.clamp(-1, 1)
    red, green = shown[:, :2].T.numpy()
    ax.scatter(red, green, s=4, c=((shown + 1) / 2).numpy(), linewidths=0)
    ax.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[], aspect="equal")
    ax.set_facecolor("0.93")
    ax.spines[:].set_visible(False)


def divergences(path: Path, ends: Mapping[tuple[str, int], Sequence[float]], floor: float) -> None:
    """Draw the JS divergence against K, a line a size; bars are standard errors, dots seeds."""
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    steps = sorted({k for _, k in ends})
    for number, size in enumerate(dict.fromkeys(size for size, _ in ends)):
        own = [(i, ends[size, k]) for i, k in enumerate(steps) if (size, k) in ends]
        places = [i + 0.08 * (number - 1) for i, _ in own]
        means, errors = zip(*(moments(values) for _, values in own), strict=True)
        ax.errorbar(places, means, errors, fmt="o-", color=f"C{number}", label=f"X = {size}")
        for place, (_, values) in zip(places, own, strict=True):
            ax.plot([place] * len(values), values, ".", color=f"C{number}", alpha=0.35)
    ax.axhline(floor, color="0.6", linestyle="--", linewidth=1, label="data against data")
    ax.set_xticks(range(len(steps)), [str(k) for k in steps])
    ax.set(xlabel="look-ahead steps K", ylabel="JS divergence of colours, nats", ylim=(0, None))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend()
    plots.save(figure, path)
