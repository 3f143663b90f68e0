"""The figures of `rnn_mnist.py`: Fig. 3, metrics over training, and what they cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lab import records, runs
from lab.data.pixels import as_floats
from lab.figures import costs, pictures, plots

CURVES = {
    "classes": "digits covered",
    "class_entropy": "entropy of the digits",
    "spread": "variance, of the data's",
    "largest_mode": "digit that most are",
}
IDEAL = {"classes": 10.0, "class_entropy": math.log(10), "spread": 1.0}
TABLE = {
    "classes": "digits",
    "class_entropy": "entropy",
    "spread": "variance",
    "largest_mode_changes": "changes",
    "rotations": "rotations",
    "cpu_seconds": "CPU s",
}
COLUMNS = 6  # of samples, as far as all settings were trained
LATER = 3  # and beyond, of those that were trained on
History = list[dict[str, Any]]


class Run(Protocol):
    """What a run is known by."""

    preset: str
    unroll_steps: int
    seed: int

    def checkpoint(self, folder: Path) -> Path:
        """Return where it is kept."""
        ...


def report(out: Path, folder: Path, configs: Sequence[Run]) -> None:
    """Write the time series and the figures of some runs, and print the tables."""
    logs: dict[str, list[dict[str, Any]]] = {}
    series = []
    for config in configs:
        log = runs.read_log(config.checkpoint(out))
        logs.setdefault(f"K = {config.unroll_steps}", []).append(log)
        series += [
            {"unroll_steps": config.unroll_steps, "seed": config.seed, **row}
            for row in log["history"]
        ]
    records.write(out / "metrics.csv", series)

    histories = {}
    for label, own in logs.items():
        length = min(len(log["history"]) for log in own)  # that all seeds have
        histories[label] = [log["history"][:length] for log in own]
    shared = min(history[-1]["pairs"] for own in histories.values() for history in own)
    short = {label: [_until(shared, h) for h in own] for label, own in histories.items()}
    print(f"\nAfter {shared:,} pairs of updates; the digits' entropy is ln 10 = 2.30 at most.\n")
    print(records.table(short, TABLE))
    longer = {
        label: own
        for label, own in histories.items()
        if all(history[-1]["pairs"] > shared for history in own)
    }
    for label, own in longer.items():
        print(f"\nAfter {own[0][-1]['pairs']:,} pairs:\n")
        print(records.table({label: own}, TABLE))

    first = configs[0]
    caption = f"updates of G and D (preset {first.preset}, seed {first.seed})"
    samples(folder / "rnn_mnist.png", {label: own[0] for label, own in logs.items()}, caption)
    plots.curves(
        folder / "rnn_mnist_curves.png",
        histories,
        CURVES,
        x="player_updates",
        ideal=IDEAL,
        log=True,
    )
    cost(folder / "rnn_mnist_costs.png", histories)
    print(f"\nTime series, settings and checkpoints are in {out}/, figures in {folder}/")


def samples(path: Path, logs: Mapping[str, Mapping[str, Any]], caption: str) -> None:
    """Draw Fig. 3: a row for each K, a column for each of some moments of training."""
    shared = min(log["history"][-1]["pairs"] for log in logs.values())
    moments = {
        label: {
            row["player_updates"]: as_floats(images)
            for row, images in zip(log["history"], log["snapshots"], strict=True)
        }
        for label, log in logs.items()
    }
    longest = max((sorted(own) for own in moments.values()), key=len)
    early = [update for update in longest if update <= 2 * shared]
    late = [update for update in longest if update >= 2 * shared]
    columns = [early[i] for i in pictures.spread(len(early), COLUMNS)]
    columns += [late[i] for i in pictures.spread(len(late), LATER + 1)][1:]
    rows = {label: [own[u] for u in columns if u in own] for label, own in moments.items()}
    pictures.grid(path, rows, [f"{update:,}" for update in columns], caption=caption)


def cost(path: Path, histories: Mapping[str, Sequence[History]], points: int = 8) -> None:
    """Draw metrics against CPU time: as far as each setting was trained."""
    panels: dict[str, dict[str, list[costs.Point]]] = {}
    for metric in ("class_entropy", "spread"):
        for label, own in histories.items():
            common = min(map(len, own))
            lines = []
            for i in sorted({round(common * 0.6**back) for back in range(points)} - {0}):
                seconds = [history[i - 1]["cpu_seconds"] for history in own]
                values = [history[i - 1][metric] for history in own]
                if min(seconds) > 0:
                    lines.append((sum(seconds) / len(seconds), values))
            panels.setdefault(CURVES[metric], {})[label] = lines
    costs.chart(path, panels, seconds="CPU seconds of a seed", metric="")


def _until(pairs: int, history: History) -> History:
    return [row for row in history if row["pairs"] <= pairs]
