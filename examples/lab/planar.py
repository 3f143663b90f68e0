"""Seeds side by side on a mixture of Gaussians: their metrics and figures."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab import figures, records, seeds
from lab.mixtures import CEILING, CURVES, TABLE, Mixture, mode_metrics, rotation

KEPT = 4  # seeds whose samples are kept for the figures


def evaluate(
    samples: Tensor, mixture: Mixture, updates: int, earlier: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], Tensor]:
    """Return the metrics of every seed's samples, `(seeds, 2, samples)`, and a snapshot."""
    each = []
    for seed, points in enumerate(samples.mT):
        row = mode_metrics(points, mixture)
        each.append(row | rotation([*seeds.of_seed(earlier, seed), row]))
    return {"player_updates": updates, "each": each}, samples[:KEPT].mT.cpu()


def report(
    name: str,
    logs: Mapping[str, Mapping[str, Any]],
    mixture: Mixture,
    *,
    folder: Path,
    seed: int,
    caption: str,
) -> None:
    """Print the table of some settings, and draw them.

    The figures are heat maps over training of the first seed, heat maps at the end of the first
    few, and curves of all.
    """
    histories = {label: seeds.histories(log) for label, log in logs.items()}
    print(f"\n{caption}\n")
    print(records.table(histories, TABLE))

    snapshots = {label: log["snapshots"] for label, log in logs.items()}
    updates = [row["player_updates"] for row in next(iter(histories.values()))[0]]
    columns = sorted({round(i * (len(updates) - 1) / 6) for i in range(7)})
    first = {label: [moments[i][0] for i in columns] for label, moments in snapshots.items()}
    last = {label: list(moments[-1]) for label, moments in snapshots.items()}
    count = next(iter(last.values()))[0].shape[0]
    draw = partial(
        figures.heat_maps,
        data=mixture.sample(count, torch.Generator().manual_seed(seed)),
        extent=1.4 * mixture.means.norm(dim=1).max().item(),
    )
    draw(
        folder / f"{name}.png",
        first,
        [f"{updates[i]:,}" for i in columns],
        caption=f"updates of G and D ({caption}, seed {seed})",
    )
    titles = [f"seed {seed + number}" for number in range(len(next(iter(last.values()))))]
    draw(folder / f"{name}_seeds.png", last, titles, caption=f"{updates[-1]:,} updates ({caption})")
    ideal = {
        "modes": len(mixture.means),
        "percent_high_quality": CEILING,
        "largest_mode_share": mixture.weights.max().item(),
    }
    figures.curves(
        folder / f"{name}_curves.png", histories, CURVES, x="player_updates", ideal=ideal
    )
