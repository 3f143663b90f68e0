"""What an experiment on images leaves behind: a grid of samples over training, curves, a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from lab import study
from lab.data.pixels import as_floats
from lab.figures import pictures, plots

COLUMNS = 5  # moments of training in the grid


def report(
    name: str,
    configs: Sequence[Any],
    logs: Sequence[Mapping[str, Any]],
    options: study.Options,
    *,
    curves: Mapping[str, str],
    table: Sequence[str],
    ideal: Mapping[str, float] | None = None,
    shown: int = 16,
) -> dict[str, list[list[dict[str, Any]]]]:
    """Draw and print, and return the histories of all models by their setting."""
    folder, first = options.figures or options.out, configs[0]
    histories, kept = study.histories(configs, logs), study.first_logs(configs, logs)
    study.table(histories, *table)
    longest = max(kept.values(), key=lambda log: len(log["history"]))
    pairs = [row["pairs"] for row in longest["history"]]
    moments = [pairs[i] for i in pictures.spread(len(pairs), COLUMNS)]
    cells = {}
    for label, log in kept.items():
        at = dict(zip([row["pairs"] for row in log["history"]], log["snapshots"], strict=True))
        cells[label] = [as_floats(at[moment][:shown]) for moment in moments if moment in at]
    pictures.grid(
        folder / f"{name}.png",
        cells,
        [f"{moment:,}" for moment in moments],
        caption=f"pairs of updates (preset {first.preset}, seed {options.first_seed})",
    )
    shortest = {k: min(map(len, own)) for k, own in histories.items()}
    drawn = {k: [history[: shortest[k]] for history in own] for k, own in histories.items()}
    plots.curves(folder / f"{name}_curves.png", drawn, curves, x="pairs", ideal=ideal or {})
    return histories
