"""Two clusters on a line: the bad basin of the original GAN, with and without unrolling.

Sun, Fang and Schwing, "Towards a Better Global Loss Landscape of GANs" (NeurIPS 2020,
https://arxiv.org/abs/2011.04926), prove that the empirical loss of separable GANs, the original
JS-GAN among them, has a basin at every collapsed state, and that of RpGAN (their RS-GAN) has none.
Here are 100 points in two clusters, 100 fixed noises, and tiny networks. While all fakes sit on one
cluster the best D of a JS-GAN has the loss 0.4774; when they match the data, 0.6931.

Does looking ahead remove the basin? `--start collapsed` begins in it: all fakes on the first
cluster, and D at its best against them.

    python examples/two_clusters.py                   JS and Rp, K = 0 and 5, twenty models each
    python examples/two_clusters.py --preset paper    the authors' code, all of its 5,000 epochs
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lab import seeds, study
from lab.data.clusters import MATCHED, PLATEAU, SAMPLES, SPREAD, clusters, counts, landmarks, noises
from lab.figures import lines
from torch import Tensor, nn

import unroll

ALONE = 3000  # steps of D at the collapsed start
Network = Callable[[Tensor], Tensor]


class HalfMinimax:
    """The minimax game, with D's loss the mean of its two terms as in the authors' code."""

    def discriminator_loss(self, discriminator: Network, fake: Tensor, real: Tensor) -> Tensor:
        return unroll.Minimax().discriminator_loss(discriminator, fake, real) / 2

    def generator_loss(self, discriminator: Network, fake: Tensor, real: Tensor) -> Tensor:
        return unroll.Minimax().generator_loss(discriminator, fake, real)


GAMES: dict[str, unroll.Objective] = {
    "JS": unroll.Criterion(nn.BCEWithLogitsLoss(), weight=0.5),
    "Rp": unroll.RelativisticPairing(),
    "minimax": HalfMinimax(),
}


@dataclass(frozen=True)
class Config(study.SideBySide):
    """The settings: those of the authors' code."""

    grows: ClassVar[str] = "epochs"
    game: Literal["JS", "Rp", "minimax"] = "JS"  # minimax: JS with the loss that theorems are about
    unroll_steps: int = 0  # K, look-ahead steps of D in G's loss
    stop_gradient: bool = False  # only the first term of Eq. 12
    start: Literal["random", "collapsed"] = "random"  # collapsed: in the basin, D trained alone
    generator_learning_rate: float = 1e-2  # SGD's
    discriminator_learning_rate: float = 1e-2  # SGD's
    momentum: float = 0.9  # SGD's, of both players
    generator_steps: int = 10  # an epoch
    discriminator_steps: int = 10  # an epoch
    generator_width: int = 5  # of two hidden layers, tanh
    discriminator_width: int = 10  # of two hidden layers, sigmoid
    compile: bool = True  # compile the look-ahead step and its adjoint
    evaluate_every: int = 10  # epochs
    epochs: int = 5000  # of 10 D and 10 G steps

    @property
    def label(self) -> str:
        return f"{self.game}-GAN, K = {self.unroll_steps}" + ", collapsed" * (
            self.start == "collapsed"
        )


PAPER = Config()
FASTER = {"generator_learning_rate": 0.05, "discriminator_learning_rate": 0.05, "epochs": 1000}
PRESETS = {
    "quick": replace(PAPER, preset="quick", **FASTER),
    "paper": PAPER,
    "narrow": replace(PAPER, preset="narrow", generator_width=3, discriminator_width=5),
}


@torch.no_grad()
def collapse(generator: nn.Sequential, z: Tensor) -> None:
    """Let every seed's fakes cover the first cluster alone, by scaling and moving the outputs."""
    last, fake = generator[-1], generator(z)
    scale = SPREAD / 4 / fake.std(-1, keepdim=True)
    last.weight *= scale
    last.bias.sub_(fake.mean(-1, keepdim=True)).mul_(scale).add_(SPREAD / 2)


def train(config: Config, options: study.Options, line: int) -> None:
    torch.set_num_threads(1)  # the networks are tiny
    rngs = seeds.generators(config)
    real, z = rngs.draw(clusters), rngs.draw(noises)
    g_sizes = [1, config.generator_width, config.generator_width, 1]
    d_sizes = [1, config.discriminator_width, config.discriminator_width, 1]
    generator = seeds.perceptrons(g_sizes, "tanh", rngs)
    discriminator = seeds.perceptrons(d_sizes, "sigmoid", rngs)
    g_optimizer, d_optimizer = (
        torch.optim.SGD(network.parameters(), rate, config.momentum)
        for network, rate in (
            (generator, config.generator_learning_rate),
            (discriminator, config.discriminator_learning_rate),
        )
    )
    game = seeds.SideBySide(GAMES[config.game], config.seeds)
    if config.start == "collapsed":
        collapse(generator, z)
        for _ in range(ALONE):
            d_loss = game.discriminator_loss(discriminator, generator(z).detach(), real)
            study.step(d_optimizer, d_loss)
    d_losses = game.discriminator_losses(discriminator, generator(z), real).tolist()

    @torch.no_grad()
    def evaluate(epochs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        fake = generator(z)
        updates = epochs * (config.generator_steps + config.discriminator_steps)
        each = []
        for seed, loss in enumerate(d_losses):
            row = {"d_loss": loss, **counts(fake[seed])}
            each.append(row | landmarks(epochs, row, seeds.of_seed(earlier, seed), config.game))
        return {"player_updates": updates, "each": each}, fake[:, 0].cpu()

    unrolled = unroll.UnrolledGeneratorLoss(
        discriminator,
        d_optimizer,
        game,
        unroll_steps=config.unroll_steps,
        compile=config.compile,
        stop_gradient=config.stop_gradient,
    )
    parts = {"g": generator, "d": discriminator, "g_sgd": g_optimizer, "d_sgd": d_optimizer}
    for _ in study.pairs(config, options, line, parts, rngs, evaluate):
        fake = generator(z).detach()
        for _ in range(config.discriminator_steps):
            study.step(d_optimizer, game.discriminator_loss(discriminator, fake, real))
        d_losses = game.discriminator_losses(discriminator, fake, real).tolist()

        for _ in range(config.generator_steps):
            study.step(g_optimizer, unrolled(generator(z), real))


def rows(record: str, config: Config, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    size = {"pairs": config.epochs * config.generator_steps, "batch_size": SAMPLES}
    return seeds.record_rows(record, config, log, size)


def report(
    configs: Sequence[Config], logs: Sequence[Mapping[str, Any]], options: study.Options
) -> str:
    folder = options.figures or options.out
    name = "two_clusters" + "_collapsed" * (configs[0].start == "collapsed")
    each = study.histories(configs, logs)
    study.table(each, "covers", "collapsed", "on_plateau", "d_loss")

    levels = {c.label: {"collapsed": PLATEAU[c.game], "matched": MATCHED} for c in configs}
    epochs = [row["epochs"] for row in logs[0]["history"]]
    d_loss = {k: [[row["d_loss"] for row in h] for h in v] for k, v in each.items()}
    lines.panels(folder / f"{name}_loss.png", epochs, d_loss, levels, "D's loss")

    data = clusters(torch.Generator().manual_seed(configs[0].first_seed))[0]
    kept = {label: log["snapshots"] for label, log in study.first_logs(configs, logs).items()}
    fakes = {label: [fake[0] for fake in snapshots] for label, snapshots in kept.items()}
    lines.paths(folder / f"{name}_data.png", epochs, fakes, data)
    return study.sentence(each, "covers", "covers both in a share of {} of the models")


SWEEP = {"unroll_steps": (0, 5), "game": ("JS", "Rp")}
HOOKS = {"options": study.Options(seeds=20), "rows": rows}
main = partial(study.main, __doc__, PRESETS, train, report, "two_clusters", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
