"""Two clusters on a line: the bad basin of the original GAN, with and without unrolling.

Sun, Fang and Schwing, "Towards a Better Global Loss Landscape of GANs" (NeurIPS 2020,
https://arxiv.org/abs/2011.04926), prove that the empirical loss of separable GANs, the original
JS-GAN among them, has a basin at every collapsed state, and that of RpGAN (their RS-GAN) has none.
Here are 100 points in two clusters, 100 fixed noises, and tiny networks. While all fakes sit on one
cluster the best D of a JS-GAN has the loss 0.4774; when they match the data, 0.6931.

Does looking ahead remove the basin? `--start collapsed` begins in it: all fakes on the first
cluster, and D at its best against them.

    python examples/two_clusters.py                               JS and Rp, K=0 and K=5
    python examples/two_clusters.py --preset paper --seeds 20     all its 5,000 epochs
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lab import cli, records, runs, seeds
from lab.data.clusters import MATCHED, PLATEAU, SAMPLES, SPREAD, clusters, counts, landmarks, noises
from lab.figures import lines
from torch import Tensor, nn

import unroll

ALONE = 3000  # steps of D at the collapsed start
Network = Callable[[Tensor], Tensor]
LINE = torch.linspace(-2, 6, 81)


class HalfMinimax:
    """The minimax game, with D's loss the mean of its two terms as in the authors' code."""

    def discriminator_loss(self, discriminator: Network, fake: Tensor, real: Tensor) -> Tensor:
        """Return `-f / 2`."""
        return unroll.Minimax().discriminator_loss(discriminator, fake, real) / 2

    def generator_loss(self, discriminator: Network, fake: Tensor, real: Tensor) -> Tensor:
        """Return `f`."""
        return unroll.Minimax().generator_loss(discriminator, fake, real)


GAMES: dict[str, unroll.Objective] = {
    "JS": unroll.Criterion(nn.BCEWithLogitsLoss(), weight=0.5),
    "Rp": unroll.RelativisticPairing(),
    "minimax": HalfMinimax(),
}


@dataclass(frozen=True)
class Config:
    """Runs of one setting, the seeds side by side. The defaults are those of the authors' code."""

    preset: str = "paper"
    game: str = "JS"
    unroll_steps: int = 0
    stop_gradient: bool = False
    start: str = "random"
    generator_lr: float = 1e-2
    discriminator_lr: float = 1e-2
    momentum: float = 0.9
    generator_steps: int = 10
    discriminator_steps: int = 10
    generator_width: int = 5
    discriminator_width: int = 10
    evaluate_every: int = 10
    device: str = "cpu"
    epochs: int = 5000
    first_seed: int = 0
    seeds: int = 20

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        cli.check(self, epochs="epochs")

    @property
    def label(self) -> str:
        """Return the name of the setting in figures."""
        return f"{self.game}-GAN, K = {self.unroll_steps}"

    def checkpoint(self, folder: Path) -> Path:
        """Return where the runs are kept."""
        name = f"{self.game}-K{self.unroll_steps}-{self.start}"
        return folder / "checkpoints" / f"{name}-seeds{self.first_seed}+{self.seeds}.pt"


PRESETS = {
    "quick": Config("quick", generator_lr=0.05, discriminator_lr=0.05, epochs=1000),
    "paper": Config("paper"),
    "narrow": Config("narrow", generator_width=3, discriminator_width=5),
}


@torch.no_grad()
def collapse(generator: nn.Sequential, z: Tensor) -> None:
    """Let every seed's fakes cover the first cluster alone, by scaling and moving the outputs."""
    last, fake = generator[-1], generator(z)
    scale = SPREAD / 4 / fake.std(-1, keepdim=True)
    last.weight *= scale
    last.bias.sub_(fake.mean(-1, keepdim=True)).mul_(scale).add_(SPREAD / 2)


def train(config: Config, line: int, *, folder: Path, resume: bool) -> Config:
    """Train the GANs of all seeds; what comes of them is in their checkpoint."""
    torch.set_num_threads(1)  # the networks are tiny
    rngs = seeds.generators(config)
    real = rngs.draw(clusters)
    z = rngs.draw(noises)
    g_sizes = [1, config.generator_width, config.generator_width, 1]
    d_sizes = [1, config.discriminator_width, config.discriminator_width, 1]
    generator = seeds.perceptrons(g_sizes, "tanh", rngs)
    discriminator = seeds.perceptrons(d_sizes, "sigmoid", rngs)
    g_optimizer = torch.optim.SGD(generator.parameters(), config.generator_lr, config.momentum)
    d_optimizer = torch.optim.SGD(
        discriminator.parameters(), config.discriminator_lr, config.momentum
    )
    game = seeds.SideBySide(GAMES[config.game], config.seeds)
    if config.start == "collapsed":
        collapse(generator, z)
        for _ in range(ALONE):
            d_loss = game.discriminator_loss(discriminator, generator(z).detach(), real)
            seeds.step(d_optimizer, d_loss)
    d_losses = game.losses(discriminator, generator(z), real)

    @torch.no_grad()
    def evaluate(epochs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        fake = generator(z)
        curves = discriminator(LINE.to(z.device).expand(config.seeds, 1, -1))
        updates = epochs * (config.generator_steps + config.discriminator_steps)
        each = []
        for seed, loss in enumerate(d_losses):
            row = {"d_loss": loss, **counts(fake[seed])}
            each.append(row | landmarks(epochs, row, seeds.of_seed(earlier, seed), config.game))
        snapshot = {"fake": fake[:, 0].cpu(), "f": curves[:, 0].cpu()}
        return {"player_updates": updates, "each": each}, snapshot

    iterations = runs.iterate(
        config.checkpoint(folder),
        asdict(config),
        {"g": generator, "d": discriminator, "g_sgd": g_optimizer, "d_sgd": d_optimizer},
        rngs,
        evaluate,
        length=config.epochs,
        every=config.evaluate_every,
        resume=resume,
        bar={"desc": config.label, "position": line, "unit": "epoch"},
        counts="epochs",
    )

    unrolled = unroll.UnrolledGeneratorLoss(
        discriminator,
        d_optimizer,
        game,
        unroll_steps=config.unroll_steps,
        stop_gradient=config.stop_gradient,
    )
    for _ in iterations:
        fake = generator(z).detach()
        for _ in range(config.discriminator_steps):
            seeds.step(d_optimizer, game.discriminator_loss(discriminator, fake, real))
        d_losses = game.losses(discriminator, fake, real)

        for _ in range(config.generator_steps):
            seeds.step(g_optimizer, unrolled(generator(z), real))
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of finished runs: settings, last metrics, provenance."""
    size = {"pairs": config.epochs * config.generator_steps, "batch_size": SAMPLES}
    return seeds.record_rows("two_clusters", config, log, size)


def report(args: argparse.Namespace, configs: Sequence[Config]) -> None:
    """Write the time series and the figures, and print the table."""
    figures = args.figures or args.out
    name = "two_clusters" + "_collapsed" * (args.start == "collapsed")
    logs = {c.label: runs.read_log(c.checkpoint(args.out)) for c in configs}
    each = {label: seeds.histories(log) for label, log in logs.items()}
    seeds.write_series(args.out, logs, configs[0].first_seed)
    columns = {"covers": "covers both", "around_first": "around 0", "around_second": "around 4"}
    print(records.table(each, columns | {"d_loss": "D's loss"}))

    levels = {c.label: {"collapsed": PLATEAU[c.game], "matched": MATCHED} for c in configs}
    epochs = [row["epochs"] for row in logs[configs[0].label]["history"]]
    d_loss = {k: [[row["d_loss"] for row in h] for h in v] for k, v in each.items()}
    lines.panels(figures / f"{name}_loss.png", epochs, d_loss, levels, "D's loss")

    data = clusters(torch.Generator().manual_seed(configs[0].first_seed))[0]
    fakes = {k: [s["fake"][0] for s in log["snapshots"]] for k, log in logs.items()}
    lines.paths(figures / f"{name}_data.png", epochs, fakes, data)
    moments = sorted({round(i * (len(epochs) - 1) / 5) for i in range(6)})
    curves = {
        k: [(log["snapshots"][m]["f"][0], log["snapshots"][m]["fake"][0]) for m in moments]
        for k, log in logs.items()
    }
    titles = [f"epoch {epochs[m]:,}" for m in moments]
    lines.functions(figures / f"{name}_d.png", LINE, curves, titles, data)
    cli.written(args, figures)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    add(
        "--games",
        nargs="+",
        choices=GAMES,
        default=["JS", "Rp"],
        help="JS: the original GAN, its generator's loss non-saturating as in the authors' code; "
        "Rp: real and fake compared in pairs, their RS-GAN; minimax: JS, with the saturating loss "
        "that theorems are about (default: JS Rp)",
    )
    cli.add_unroll_steps(add, 0, 5)
    add("--stop-gradient", action="store_true", help="only the first term of Eq. 12")
    add(
        "--start",
        choices=("random", "collapsed"),
        default="random",
        help="random (default), or collapsed: in the basin, with D trained alone for "
        f"{ALONE:,} steps",
    )
    add = parser.add_argument_group("the experiment").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="paper: the authors' code, 5,000 epochs of 10 D and 10 G steps with SGD. quick "
        "(default): both learning rates five times theirs and a fifth of the epochs. narrow: the "
        "authors' with 5 units a layer in D for 10, and 3 in G for 5",
    )
    add("--epochs", type=int, metavar="N", help="of 10 D and 10 G steps (default: the preset's)")
    cli.add_run_flags(parser, "two_clusters", seeds=20, figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    base = cli.chosen(given, PRESETS)
    return [
        replace(base, game=game, unroll_steps=k) for k in given["steps"] for game in given["games"]
    ]


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    configs = cli.carry_out(parser, args, build, train, record_rows, length="epochs")
    report(args, configs)


if __name__ == "__main__":
    main()
