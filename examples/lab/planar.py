"""GANs on mixtures of Gaussians in the plane, their seeds side by side: training and figures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unroll
from lab import records, runs, seeds
from lab.data.mixtures import CEILING, CURVES, TABLE, Mixture, mode_metrics, rotation
from lab.figures import plots

KEPT = 4  # seeds whose samples are kept for the figures


class Players:
    """Both networks of every seed, what trains them, and what they are trained on.

    Args:
        config: Of the experiment: `batch_size`, `samples`, `pairs`, `evaluate_every`, `seeds`.
        rngs: Of the seeds.
        mixture: The data.
        noise: Given a count, draws inputs of the generators.
        generator: Of every seed.
        discriminator: Of every seed.
        game: One seed's.
        rates: Adam's learning rates for G and D.
        betas: And its momenta.
    """

    def __init__(
        self,
        config: Any,
        rngs: seeds.Generators,
        mixture: Mixture,
        noise: Callable[[int], Tensor],
        generator: nn.Module,
        discriminator: nn.Module,
        game: unroll.Objective,
        *,
        rates: tuple[float, float],
        betas: tuple[float, float],
    ) -> None:
        self.config, self.rngs, self.mixture = config, rngs, mixture
        self.generator, self.discriminator = generator, discriminator
        self.g_optimizer, self.d_optimizer = (
            torch.optim.Adam(network.parameters(), rate, betas)
            for network, rate in zip((generator, discriminator), rates, strict=True)
        )
        self.game = seeds.SideBySide(game, config.seeds)
        self.draw_noise = noise
        self.held_out = noise(config.samples)
        self.batch_size = config.batch_size
        self.updates = 2  # of G and D a pair

    def noise(self) -> Tensor:
        """Return a batch of inputs of the generators."""
        return self.draw_noise(self.batch_size)

    def fake(self) -> Tensor:
        """Return generated samples, `(seeds, 2, samples)`."""
        samples: Tensor = self.generator(self.noise())
        return samples

    def real(self, rngs: seeds.Generators | None = None) -> Tensor:
        """Return data, `(seeds, 2, samples)`."""
        rngs = rngs or self.rngs
        return rngs.draw(lambda rng: self.mixture.sample(self.batch_size, rng).T)

    def train_discriminator(self, fake: Tensor | None = None, real: Tensor | None = None) -> None:
        """Update every D once, on new samples where none are given."""
        fake = self.fake() if fake is None else fake
        real = self.real() if real is None else real
        seeds.step(
            self.d_optimizer,
            self.game.discriminator_loss(self.discriminator, fake.detach(), real),
        )

    def follow(self, g_loss: Tensor) -> None:
        """Update every G once."""
        seeds.step(self.g_optimizer, g_loss)

    @torch.no_grad()
    def evaluate(
        self, pairs: int, earlier: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], Any]:
        """Return the metrics of every seed, and a snapshot for the figures."""
        samples = self.generator(self.held_out)
        return evaluate(samples, self.mixture, self.updates * pairs, earlier)

    def iterate(
        self,
        folder: Path,
        *,
        resume: bool,
        label: str,
        line: int,
        evaluate: Any = None,
        **parts: runs.Stateful,
    ) -> Iterator[int]:
        """Count the pairs of updates, with evaluations and checkpoints between them.

        Args:
            folder: Where the run is kept.
            resume: Whether to continue the one that is there.
            label: Of the progress bar.
            line: That it is on.
            evaluate: In place of the players' own.
            parts: What else training changes.
        """
        return runs.iterate(
            self.config.checkpoint(folder),
            asdict(self.config),
            {
                "g": self.generator,
                "d": self.discriminator,
                "g_adam": self.g_optimizer,
                "d_adam": self.d_optimizer,
                **parts,
            },
            self.rngs,
            evaluate or self.evaluate,
            length=self.config.pairs,
            every=self.config.evaluate_every,
            resume=resume,
            bar={"desc": label, "position": line, "unit": "pair"},
        )


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
        plots.heat_maps,
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
    plots.curves(folder / f"{name}_curves.png", histories, CURVES, x="player_updates", ideal=ideal)
