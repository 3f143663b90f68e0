"""What a run of GANs on images leaves behind: time series, sample grids, curves, a table."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from lab import records, runs
from lab.data.pixels import as_floats
from lab.figures import pictures, plots

COLUMNS = 5  # moments of training in the grid


def report(
    args: argparse.Namespace, configs: Sequence[Any], name: str, panels: Mapping[str, str]
) -> None:
    """Write the time series and the figures, and print the last metrics.

    Args:
        args: The command line: `out` and `figures`.
        configs: The finished runs, each with a `label` and a `seed`.
        name: Of the figures' files.
        panels: The metrics that are drawn and printed, and what they are called.
    """
    folder, first = args.figures or args.out, configs[0]
    logs = {(c.label, c.seed): runs.read_log(c.checkpoint(args.out)) for c in configs}
    histories: dict[str, list[list[dict[str, Any]]]] = {}
    rows, cells = [], {}
    steps = [row["pairs"] for row in logs[first.label, first.seed]["history"]]
    moments = pictures.spread(len(steps), COLUMNS)
    for (label, seed), log in logs.items():
        histories.setdefault(label, []).append(log["history"])
        rows += [{"setting": label, "seed": seed} | row for row in log["history"]]
        if seed == first.seed:
            shown = [log["snapshots"][moment] for moment in moments]
            cells[label] = [as_floats(s) for s in shown]
    records.write(args.out / "metrics.csv", rows)
    titles = [f"{steps[moment]:,}" for moment in moments]
    pictures.grid(folder / f"{name}.png", cells, titles, caption=f"pairs; seed {first.seed}")
    plots.curves(folder / f"{name}_curves.png", histories, panels, x="pairs", ideal={})
    print(records.table(histories, panels))
    print(f"\nTime series, settings and checkpoints are in {args.out}/, figures in {folder}/")
