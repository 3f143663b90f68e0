"""The GAN of Appendix A on the ring of 8 Gaussians, its seeds side by side.

Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative Adversarial Networks" (ICLR 2017,
https://arxiv.org/abs/1611.02163). The draws come in the order of `examples/mog.py`: a seed starts
from the same networks and sees the same batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unroll
from lab import planar, runs, seeds
from lab.mixtures import Mixture, ring
from lab.networks import Scale

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
        if self.unroll_steps < 0:
            raise ValueError(f"--unroll-steps must not be negative, got {self.unroll_steps}")
        for name, flag in (("pairs", "iterations"), ("generator_steps", "generator-steps")):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{flag} must be positive, got {getattr(self, name)}")


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


class Players:
    """Both networks of every seed, what trains them, and what they are trained on."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)  # the networks are tiny
        self.settings = settings
        self.rngs = self.new_generators()
        self.mixture = mixture(settings.device)
        layers = partial(seeds.perceptrons, activation="relu", rngs=self.rngs, gain=0.8)
        self.generator = layers([NOISES, WIDTH, WIDTH, 2])
        self.discriminator = nn.Sequential(Scale(0.25), *layers([2, WIDTH, 1]))
        rate = settings.learning_rate
        self.g_optimizer = torch.optim.Adam(self.generator.parameters(), rate, BETAS)
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), rate, BETAS)
        self.game = seeds.SideBySide(unroll.Minimax(), settings.seeds)
        self.held_out = self.noise(settings.samples)

    def new_generators(self) -> seeds.Generators:
        """Return the random numbers of every seed, from the start."""
        first = self.settings.first_seed
        return seeds.Generators(range(first, first + self.settings.seeds), self.settings.device)

    def noise(self, count: int | None = None) -> Tensor:
        """Return inputs of the generators, `(seeds, noises, samples)`."""
        shape = count or self.settings.batch_size, NOISES
        return self.rngs.draw(lambda rng: torch.randn(shape, generator=rng, device=rng.device).T)

    def real(self, rngs: seeds.Generators | None = None) -> Tensor:
        """Return data, `(seeds, 2, samples)`."""
        size = self.settings.batch_size
        return (rngs or self.rngs).draw(lambda rng: self.mixture.sample(size, rng).T)

    def train_discriminator(self) -> None:
        """Update every D once."""
        fake = self.generator(self.noise()).detach()
        loss = self.game.discriminator_loss(self.discriminator, fake, self.real())
        self.d_optimizer.zero_grad()
        loss.backward()
        self.d_optimizer.step()

    def follow(self, g_loss: Tensor) -> None:
        """Update every G once."""
        self.g_optimizer.zero_grad()
        g_loss.backward()
        self.g_optimizer.step()

    def look(self, pairs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        """Return the metrics of every seed, and a snapshot for the figures.

        Beside those of `planar.evaluate`: `percent_outside`, samples that the figures do not show.
        """
        with torch.no_grad():
            samples = self.generator(self.held_out)
        updates = pairs * (1 + self.settings.generator_steps)
        row, snapshot = planar.evaluate(samples, self.mixture, updates, earlier)
        outside = (samples.abs().amax(1) > WINDOW).double().mean(1)
        for each, share in zip(row["each"], outside.tolist(), strict=True):
            each["percent_outside"] = 100 * share
        return row, snapshot

    def iterate(
        self, path: Path, evaluate: Any, *, resume: bool, label: str, line: int, **parts: Any
    ) -> Iterator[int]:
        """Count the pairs of updates, with evaluations and checkpoints between them."""
        return runs.iterate(
            path,
            asdict(self.settings),
            {
                "g": self.generator,
                "d": self.discriminator,
                "g_adam": self.g_optimizer,
                "d_adam": self.d_optimizer,
                **parts,
            },
            self.rngs,
            evaluate,
            length=self.settings.pairs,
            every=self.settings.evaluate_every,
            resume=resume,
            bar={"desc": label, "position": line, "unit": "pair"},
        )


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
    size = {"pairs": settings.pairs, "batch_size": settings.batch_size}
    return seeds.record_rows(experiment, settings, {**log, "history": [*history, last]}, size)
