"""Metrics and figures of GANs on Gaussians in the plane, whose seeds are trained side by side."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lab import seeds, study
from lab.data.mixtures import CEILING, CURVES, Mixture, mode_metrics, rotation
from lab.figures import plots

KEPT = 4  # seeds whose samples are kept for the figures
WINDOW = 2.8  # half the side of the figures of Appendix B
TABLE = "modes", "modes_quarter_share", "percent_high_quality", "reverse_kl_all", "rotations"
LATE = "modes", "percent_high_quality", "percent_outside", "reverse_kl_all"


def evaluation(
    generator: nn.Module,
    held_out: Tensor,
    mixture: Mixture,
    *,
    updates: int = 2,
    window: float | None = None,
) -> Callable[[int, Sequence[Mapping[str, Any]]], tuple[dict[str, Any], Tensor]]:
    """Return a function that measures every seed's samples: metrics, and a snapshot for figures."""

    @torch.no_grad()
    def evaluate(pairs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        samples, each = generator(held_out), []
        for seed, points in enumerate(samples.mT):
            row = mode_metrics(points, mixture)
            row |= rotation([*seeds.of_seed(earlier, seed), row])
            if window:
                outside = (points.abs().amax(1) > window).double().mean()
                row["percent_outside"] = 100 * outside.item()
            each.append(row)
        return {"player_updates": updates * pairs, "each": each}, samples[:KEPT].mT.cpu()

    return evaluate


def late_rows(
    experiment: str, config: Any, log: Mapping[str, Any], *, also: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the rows of a record with metrics "late_...": means over the last third."""
    frame = pd.DataFrame(study.model_rows(experiment, config, log))
    late = frame[frame["pairs"] >= 2 / 3 * config.pairs].groupby("seed")[[*LATE, *also]]
    means = late.mean().add_prefix("late_").to_dict("index")
    return [row | means[row["seed"]] for row in study.last_rows(experiment, config, log)]


def report(
    name: str,
    results: study.Results,
    mixture: Mixture,
    *,
    curves: Mapping[str, str] = CURVES,
    table: Sequence[str] = TABLE,
) -> None:
    """Print the table of some settings, and draw them.

    The figures are samples over training of the first seed, samples at the end of the first few,
    and curves of all.
    """
    folder, first = results.folder, results.first
    results.table(*table)
    updates = [row["player_updates"] for row in results.logs[0]["history"]]
    columns = plots.spread(len(updates), 7)
    snapshots = {label: log["snapshots"] for label, log in results.first_logs.items()}
    count = results.logs[0]["snapshots"][0].shape[1]
    draw = partial(
        plots.heat_maps,
        data=mixture.sample(count, torch.Generator().manual_seed(first.first_seed)),
        extent=1.4 * mixture.means.norm(dim=1).max().item(),
    )
    draw(
        folder / f"{name}.png",
        {label: [moments[i][0] for i in columns] for label, moments in snapshots.items()},
        [f"{updates[i]:,}" for i in columns],
        caption=f"updates of G and D (preset {first.preset}, seed {first.first_seed})",
    )
    if first.seeds > 1:
        last = {label: list(moments[-1]) for label, moments in snapshots.items()}
        titles = [f"seed {first.first_seed + number}" for number in range(min(first.seeds, KEPT))]
        draw(folder / f"{name}_seeds.png", last, titles, caption=f"{updates[-1]:,} updates")
    ideal = {
        "modes": len(mixture.means),
        "percent_high_quality": CEILING,
        "largest_mode_share": mixture.weights.max().item(),
    }
    path = folder / f"{name}_curves.png"
    plots.curves(path, results.frame, curves, x="player_updates", ideal=ideal)


def report_by(
    name: Callable[[Any], str],
    mixture: Callable[[Any], Mixture],
    results: study.Results,
    **how: Any,
) -> str:
    """Report settings by the names of their figures, and return how many modes each holds."""
    for each in dict.fromkeys(map(name, results.configs)):
        own = results.only(lambda config, each=each: name(config) == each)
        report(each, own, mixture(own.first), **how)
    modes = len(mixture(results.first).means)
    return results.sentence("modes", f"holds {{}} of {modes} modes")
