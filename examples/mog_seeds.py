"""Many seeds of `mog.py` at once: Fig. 2 in numbers, its controls, and the mixtures of PacGAN.

The runs of `mog.py`, side by side: the same seed draws the same numbers and trains to the same
samples, to round-off. What is compared:

    steps        K look-ahead steps: section 3.1 and Fig. 2 of https://arxiv.org/abs/1611.02163
    minibatches  one minibatch for all K steps against fresh ones (section 3: no significant
                 difference)
    real-steps   K look-ahead steps against K real steps of D (section 2.3: not the same)

    python examples/mog_seeds.py --preset paper --unroll-steps 0 1 5 10
    python examples/mog_seeds.py --mixture grid --unroll-steps 0 5 10
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mog
import torch
from lab import cli, planar, records, runs, seeds
from lab.data.mixtures import Mixture, grid, ring
from lab.networks.perceptrons import ACTIVATIONS, Scale
from torch import Tensor, nn

import unroll

RECORDS = {"steps": "mog_seeds", "minibatches": "mog_resample", "real-steps": "mog_dsteps"}
MIXTURES: dict[str, dict[str, Any]] = {
    "fig2": {},  # the preset's ring
    "ring": {"radius": 1.0, "deviation": 0.01},
    "grid": {"radius": 4.0, "deviation": 0.05},
}


@dataclass(frozen=True)
class Config(mog.Config):
    """Runs of one setting, the seeds from `seed` on side by side."""

    mixture: str = "fig2"
    half_life: int = 0  # pairs after which both learning rates have halved; 0: they stay
    seeds: int = 10

    @property
    def first_seed(self) -> int:
        """Return the first seed."""
        return self.seed

    @property
    def label(self) -> str:
        """Return the name of the arm in figures."""
        label = f"K = {self.unroll_steps}" + ", fresh" * self.resample
        return label + f", {self.discriminator_steps} D" * (self.discriminator_steps > 1)

    def checkpoint(self, folder: Path) -> Path:
        """Return where the runs are kept."""
        arm = self.label.replace(" = ", "").replace(", ", "-").replace(" ", "")
        name = f"{self.preset}-{self.mixture}-{arm}-seeds{self.seed}+{self.seeds}.pt"
        return folder / "checkpoints" / name


PRESETS = {name: Config(**asdict(preset)) for name, preset in mog.PRESETS.items()}


def data(config: Config) -> Mixture:
    """Return the mixture."""
    size = {"radius": config.radius, "deviation": config.deviation, "device": config.device}
    return grid(**size) if config.mixture == "grid" else ring(mog.MODES, **size)


def train(config: Config, line: int, *, folder: Path, resume: bool) -> Config:
    """Train the GANs of all seeds; what comes of them is in their checkpoint."""
    torch.set_num_threads(1)  # the networks are tiny
    rngs = seeds.generators(config)
    layers = partial(seeds.perceptrons, activation=config.activation, rngs=rngs, gain=config.gain)
    hidden = [config.width] * config.discriminator_layers

    def noise(count: int) -> Tensor:
        return rngs.normal(count, config.noise_size).mT.contiguous()  # as mog.py draws them

    players = planar.Players(
        config,
        rngs,
        data(config),
        noise,
        layers([config.noise_size, config.width, config.width, 2]),
        nn.Sequential(Scale(config.input_scale), layers([2, *hidden, 1])),
        unroll.Minimax(),
        rates=(config.generator_lr, config.discriminator_lr),
        betas=(config.beta1, 0.999),
    )
    players.updates = config.generator_steps + config.discriminator_steps
    unrolled = unroll.UnrolledGeneratorLoss(
        players.discriminator,
        players.d_optimizer,
        players.game,
        unroll_steps=config.unroll_steps,
        stop_gradient=config.stop_gradient,
        average=config.average,
    )
    label = f"{config.mixture}, {config.label}"
    for pair in players.iterate(folder, resume=resume, label=label, line=line):
        if config.half_life:
            factor = 0.5 ** (pair / config.half_life)
            players.g_optimizer.param_groups[0]["lr"] = factor * config.generator_lr
            players.d_optimizer.param_groups[0]["lr"] = factor * config.discriminator_lr

        for _ in range(config.discriminator_steps):
            players.train_discriminator()

        for _ in range(config.generator_steps):
            fresh = ((players.fake(), players.real()) for _ in range(config.unroll_steps))
            minibatches = fresh if config.resample else None
            players.follow(unrolled(players.fake(), players.real(), minibatches=minibatches))
    return config


record_rows = partial(seeds.record_rows, "mog")


def report(args: argparse.Namespace, configs: Sequence[Config]) -> None:
    """Write the time series and the figures, and print the table."""
    folder, first = args.figures or args.out, configs[0]
    logs = {c.label: runs.read_log(c.checkpoint(args.out)) for c in configs}
    halved = "_halved" if first.half_life else ""
    planar.report(
        f"{RECORDS[args.compare]}_{first.preset}_{first.mixture}{halved}",
        logs,
        data(first),
        folder=folder,
        seed=first.seed,
        caption=f"preset {first.preset}, {first.mixture}",
    )
    seeds.write_series(args.out, logs, first.seed)
    cli.written(args, folder)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    add(
        "--compare",
        choices=RECORDS,
        default="steps",
        help="what is compared (default: steps); each has a record of its own",
    )
    text = (
        "look-ahead steps of D in the generator's loss, and where real steps are compared their "
        "number too; 0 is the standard GAN"
    )
    cli.add_unroll_steps(add, 0, 10, text=text)
    add = parser.add_argument_group("the experiment").add_argument
    add("--preset", choices=PRESETS, default="quick", help="those of mog.py (default: quick)")
    add(
        "--mixture",
        choices=MIXTURES,
        default="fig2",
        help="fig2: the preset's ring (default). ring: of radius 1 and deviation 0.01, and grid: "
        "5x5, from -4 to 4, deviation 0.05, as PacGAN's code has them",
    )
    add("--activation", choices=ACTIVATIONS, help="of both networks (default: the preset's)")
    add("--discriminator-layers", type=cli.positive, metavar="N", help="hidden layers of D")
    add("--generator-lr", type=float, metavar="ETA", help="Adam's learning rate for G")
    add("--discriminator-lr", type=float, metavar="ETA", help="and for D, real or unrolled steps")
    add(
        "--half-life",
        type=cli.positive,
        metavar="PAIRS",
        help="halve both learning rates, smoothly, every so many pairs (default: never)",
    )
    add("--batch-size", type=cli.positive, metavar="N", help="default: the preset's")
    cli.add_iterations(add)
    add("--samples", type=cli.positive, metavar="N", help="behind every metric (default: 2500)")
    add("--evaluate-every", type=cli.positive, metavar="PAIRS", help="default: the preset's")
    cli.add_run_flags(parser, RECORDS["steps"], seeds=10, figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    base = cli.chosen({**MIXTURES[given["mixture"]], **given}, PRESETS)
    ahead = [replace(base, unroll_steps=k) for k in dict.fromkeys(given["steps"])]
    if given["compare"] == "minibatches":
        return [replace(c, resample=fresh) for c in ahead for fresh in (False, True)]
    if given["compare"] == "real-steps":
        standard = replace(base, unroll_steps=0)
        real = [replace(standard, discriminator_steps=c.unroll_steps) for c in ahead]
        return [standard, *real, *ahead]
    return ahead


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    if args.record == records.RESULTS / f"{RECORDS['steps']}.csv":
        args.record = records.RESULTS / f"{RECORDS[args.compare]}.csv"
    report(args, cli.carry_out(parser, args, build, train, record_rows))


if __name__ == "__main__":
    main()
