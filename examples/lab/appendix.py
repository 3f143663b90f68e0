"""The GAN of Appendix A on the ring of 8 Gaussians, its seeds side by side.

Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative Adversarial Networks" (ICLR 2017,
https://arxiv.org/abs/1611.02163). The draws come in the order of `examples/mog.py`: a seed starts
from the same networks and sees the same batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import unroll
from lab import cli, planar, seeds
from lab.data.mixtures import Mixture, ring
from lab.networks.perceptrons import Scale

MODES = 8
NOISES = 256
WIDTH = 128  # of D too (ours)
BETAS = (0.5, 0.999)
WINDOW = 2.8  # half the side of the figures
LATE = ("modes", "percent_high_quality", "percent_outside", "reverse_kl_all")


@dataclass(frozen=True)
class Settings:
    """What the experiments of Appendix B share. The defaults are Appendix A."""

    preset: str = "paper"
    unroll_steps: int = 0
    generator_steps: int = 1
    learning_rate: float = 1e-4  # of both players
    samples: int = 2500
    evaluate_every: int = 250
    device: str = "cpu"
    pairs: int = 25_000
    batch_size: int = 512  # ours
    first_seed: int = 0
    seeds: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        rate = {"learning_rate": "learning-rate"}
        cli.check(self, pairs="iterations", generator_steps="generator-steps", **rate)


QUICK = {
    "preset": "quick",
    "learning_rate": 1e-3,
    "batch_size": 256,
    "pairs": 3500,
    "evaluate_every": 50,
}


def mixture(device: str = "cpu") -> Mixture:
    """Return the data."""
    return ring(MODES, radius=2.0, deviation=0.02, device=device)


def players(settings: Settings) -> planar.Players:
    """Return the networks of Appendix A, with what trains them."""
    torch.set_num_threads(1)  # the networks are tiny
    rngs = seeds.generators(settings)
    layers = partial(seeds.perceptrons, activation="relu", rngs=rngs, gain=0.8)

    def noise(count: int) -> Tensor:
        return rngs.normal(count, NOISES).mT.contiguous()

    found = planar.Players(
        settings,
        rngs,
        mixture(settings.device),
        noise,
        layers([NOISES, WIDTH, WIDTH, 2]),
        nn.Sequential(Scale(0.25), *layers([2, WIDTH, 1])),
        unroll.Minimax(),
        rates=(settings.learning_rate, settings.learning_rate),
        betas=BETAS,
    )
    found.updates = 1 + settings.generator_steps
    return found


def look(
    both: planar.Players, pairs: int, earlier: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], Any]:
    """Return the players' metrics, and `percent_outside`: samples that the figures do not show."""
    row, snapshot = both.evaluate(pairs, earlier)
    with torch.no_grad():
        samples = both.generator(both.held_out)
    outside = (samples.abs().amax(1) > WINDOW).double().mean(1)
    for each, share in zip(row["each"], outside.tolist(), strict=True):
        each["percent_outside"] = 100 * share
    return row, snapshot


def record_rows(
    experiment: str, settings: Settings, log: Mapping[str, Any], also: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return what is kept of finished runs, a row a seed.

    Metrics named `late_...` are means over the last third of the training.

    Args:
        experiment: Its name.
        settings: Of all seeds.
        log: What `runs.iterate` wrote.
        also: More metrics to take such means of.
    """
    history = log["history"]
    last_third = [row["each"] for row in history if row["pairs"] >= 2 / 3 * settings.pairs]
    each = []
    for seed, row in enumerate(history[-1]["each"]):
        means = {
            f"late_{name}": sum(rows[seed][name] for rows in last_third) / len(last_third)
            for name in (*LATE, *also)
        }
        each.append(row | means)
    last = history[-1] | {"each": each}
    return seeds.record_rows(experiment, settings, {**log, "history": [*history, last]})
