"""Five Gaussians on a circle: JS-GAN against RpGAN in wide and narrow networks, and unrolled.

The second toy of Sun, Fang and Schwing, "Towards a Better Global Loss Landscape of GANs" (NeurIPS
2020, https://arxiv.org/abs/2011.04926), who find that pairing real with fake (RpGAN, their RS-GAN)
does better than the original JS-GAN with relatively narrow networks. Their code keeps the last
layer of D at unit norm for RpGAN alone; here `--normalise` is for both games, in real steps and in
those that look ahead.

    python examples/five_gaussians.py                            JS and Rp, K=0 and K=5, narrow
    python examples/five_gaussians.py --preset paper --width 128 --seeds 10
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import cli, planar, runs, seeds
from lab.data.mixtures import Mixture, ring
from torch import Tensor
from torch.nn.functional import normalize

import unroll

GAMES: dict[str, unroll.Objective] = {
    "JS": unroll.NonSaturating(),
    "Rp": unroll.RelativisticPairing(),
}
LAST = "4.weight"  # of D


@dataclass(frozen=True)
class Config:
    """Runs of one setting, the seeds side by side. The defaults are those of the authors' code."""

    preset: str = "paper"
    game: str = "JS"
    unroll_steps: int = 0
    stop_gradient: bool = False
    normalise: bool = False
    width: int = 128  # of both networks
    generator_lr: float = 1e-4
    discriminator_lr: float = 1e-4
    beta1: float = 0.0
    beta2: float = 0.9
    noise_size: int = 2
    samples: int = 2500
    evaluate_every: int = 250
    device: str = "cpu"
    pairs: int = 20_000
    batch_size: int = 128
    first_seed: int = 0
    seeds: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        cli.check(self, pairs="iterations", width="width")

    @property
    def label(self) -> str:
        """Return the name of the setting in figures."""
        return f"{self.game}, K = {self.unroll_steps}"

    def checkpoint(self, folder: Path) -> Path:
        """Return where the runs are kept."""
        normalised = "-normalised" * self.normalise
        setting = f"{self.game}-K{self.unroll_steps}-width{self.width}{normalised}"
        return folder / "checkpoints" / f"{setting}-seeds{self.first_seed}+{self.seeds}.pt"


PRESETS = {
    "quick": Config(
        "quick",
        width=16,
        generator_lr=1e-3,
        discriminator_lr=1e-3,
        pairs=2000,
        evaluate_every=50,
    ),
    "paper": Config("paper"),
}


def normalised(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return D's parameters with the rows of the last layer at unit norm."""
    return {**parameters, LAST: normalize(parameters[LAST], dim=-1)}


def data(config: Config) -> Mixture:
    """Return five Gaussians on the unit circle, of covariance 0.002."""
    return ring(5, radius=1.0, deviation=math.sqrt(0.002), device=config.device)


def train(config: Config, line: int, *, folder: Path, resume: bool) -> Config:
    """Train the GANs of all seeds; what comes of them is in their checkpoint."""
    torch.set_num_threads(1)  # the networks are tiny
    rngs = seeds.generators(config)
    hidden = [config.width, config.width]
    players = planar.Players(
        config,
        rngs,
        data(config),
        partial(rngs.normal, config.noise_size),
        seeds.perceptrons([config.noise_size, *hidden, 2], "relu", rngs),
        seeds.perceptrons([2, *hidden, 1], "leaky_relu", rngs, last_bias=False),
        GAMES[config.game],
        rates=(config.generator_lr, config.discriminator_lr),
        betas=(config.beta1, config.beta2),
    )
    generator, discriminator = players.generator, players.discriminator
    unrolled = unroll.UnrolledGeneratorLoss(
        discriminator,
        players.d_optimizer,
        players.game,
        unroll_steps=config.unroll_steps,
        stop_gradient=config.stop_gradient,
        project=normalised if config.normalise else None,
    )
    label = f"{config.label}, width {config.width}"
    for _ in players.iterate(folder, resume=resume, label=label, line=line):
        real, z = players.real(), players.noise()
        players.train_discriminator(generator(z), real)
        if config.normalise:
            discriminator.load_state_dict(normalised(discriminator.state_dict()))
        players.follow(unrolled(generator(z), real))
    return config


record_rows = partial(seeds.record_rows, "five_gaussians")


def report(args: argparse.Namespace, configs: Sequence[Config]) -> None:
    """Write the time series and the figures, and print the tables."""
    folder = args.figures or args.out
    everything = {}
    for width in dict.fromkeys(config.width for config in configs):
        logs = {c.label: runs.read_log(c.checkpoint(args.out)) for c in configs if c.width == width}
        everything |= {f"{label}, width {width}": log for label, log in logs.items()}
        first = configs[0]
        planar.report(
            f"five_gaussians_{width}" + "_normalised" * first.normalise,
            logs,
            data(first),
            folder=folder,
            seed=first.first_seed,
            caption=f"preset {first.preset}, width {width}",
        )
    seeds.write_series(args.out, everything, configs[0].first_seed)
    cli.written(args, folder)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    add(
        "--games",
        nargs="+",
        choices=GAMES,
        default=list(GAMES),
        help="JS: the original GAN, its generator's loss non-saturating as in the authors' code; "
        "Rp: real and fake compared in pairs, their RS-GAN (default: both)",
    )
    cli.add_unroll_steps(add, 0, 5)
    add("--stop-gradient", action="store_true", help="only the first term of Eq. 12")
    add(
        "--normalise",
        action="store_true",
        help="keep the last layer of D at unit norm after every step, real or looked ahead, in "
        "both games; the authors' code does so in RpGAN alone",
    )
    add = parser.add_argument_group("the experiment").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="paper: the authors' code, with 20,000 pairs of updates. quick (default): learning "
        "rates of 1e-3 for 1e-4, 2,000 pairs, and 16 units a layer for 128",
    )
    add(
        "--width",
        dest="widths",
        type=cli.positive,
        nargs="+",
        metavar="UNITS",
        help="of the hidden layers of both networks; several are trained (default: the preset's)",
    )
    cli.add_iterations(add)
    cli.add_run_flags(parser, "five_gaussians", seeds=10, figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    base = cli.chosen(given, PRESETS)
    return [
        replace(base, game=game, unroll_steps=k, width=width)
        for width in given.get("widths", [base.width])
        for k in given["steps"]
        for game in given["games"]
    ]


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    report(args, cli.carry_out(parser, args, build, train, record_rows))


if __name__ == "__main__":
    main()
