"""GANs on mixtures of Gaussians in the plane, their seeds side by side: metrics and figures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

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
    """Return what measures the samples of every seed: metrics, and a snapshot for the figures."""

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
    history = log["history"]
    last_third = [row["each"] for row in history if row["pairs"] >= 2 / 3 * config.pairs]
    each = []
    for seed, row in enumerate(history[-1]["each"]):
        means = {
            f"late_{name}": sum(rows[seed][name] for rows in last_third) / len(last_third)
            for name in (*LATE, *also)
        }
        each.append(row | means)
    last = history[-1] | {"each": each}
    return seeds.record_rows(experiment, config, {**log, "history": [*history, last]})


def report(
    name: str,
    configs: Sequence[Any],
    logs: Sequence[Mapping[str, Any]],
    mixture: Mixture,
    options: study.Options,
    *,
    curves: Mapping[str, str] = CURVES,
    table: Sequence[str] = TABLE,
) -> None:
    """Print the table of some settings, and draw them.

    The figures are samples over training of the first seed, samples at the end of the first few,
    and curves of all.
    """
    folder, first = options.figures or options.out, configs[0]
    caption = f"preset {first.preset}, seed {first.first_seed}"
    histories, kept = study.histories(configs, logs), study.first_logs(configs, logs)
    study.table(histories, *table)
    updates = [row["player_updates"] for row in logs[0]["history"]]
    columns = sorted({round(i * (len(updates) - 1) / 6) for i in range(7)})
    snapshots = {label: log["snapshots"] for label, log in kept.items()}
    count = logs[0]["snapshots"][0].shape[1]
    draw = partial(
        plots.heat_maps,
        data=mixture.sample(count, torch.Generator().manual_seed(first.first_seed)),
        extent=1.4 * mixture.means.norm(dim=1).max().item(),
    )
    draw(
        folder / f"{name}.png",
        {label: [moments[i][0] for i in columns] for label, moments in snapshots.items()},
        [f"{updates[i]:,}" for i in columns],
        caption=f"updates of G and D ({caption})",
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
    plots.curves(folder / f"{name}_curves.png", histories, curves, x="player_updates", ideal=ideal)


def report_by(
    name: Callable[[Any], str],
    mixture: Callable[[Any], Mixture],
    configs: Sequence[Any],
    logs: Sequence[Mapping[str, Any]],
    options: study.Options,
    **how: Any,
) -> str:
    """Report settings by the names of their figures, and return how many modes each holds."""
    runs = list(zip(configs, logs, strict=True))
    for each in dict.fromkeys(map(name, configs)):
        own = [run for run in runs if name(run[0]) == each]
        report(each, *zip(*own, strict=True), mixture(own[0][0]), options, **how)
    modes = len(mixture(configs[0]).means)
    return study.sentence(study.histories(configs, logs), "modes", f"holds {{}} of {modes} modes")
