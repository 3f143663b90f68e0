"""Eight Gaussians of unequal weights, with the right unrolled gradient and with half of it.

After the README of https://github.com/andrewliao11/unrolled-gans, which made the mixture of Metz et
al. (https://arxiv.org/abs/1611.02163) harder by random weights and found that unrolling helps
slightly at a standard deviation of the weights of 0.06, fails at 0.12 and helps more with ReLU than
with tanh. Its code detaches the fakes in the look-ahead, so it follows the first term of the
paper's Eq. 12 only; here that is `--gradients first`, beside the whole gradient.

    python examples/mog_nonuniform.py                    ReLU, all three weights, narrow networks
    python examples/mog_nonuniform.py --preset readme    its networks, batches and 3,000 pairs
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import cli, planar, runs, seeds
from lab.data.mixtures import Mixture, ring

import unroll

MODES = 8
# Seeds of the weights: the first whose standard deviation is within 0.0005 of the README's.
WEIGHTS = {0.0: None, 0.06: 44, 0.12: 3}


@dataclass(frozen=True)
class Config:
    """Runs of one setting, the seeds side by side. The defaults are those of the README's code."""

    preset: str = "readme"
    weight_deviation: float = 0.06
    activation: str = "relu"  # of the generator; D has ReLU
    unroll_steps: int = 10
    stop_gradient: bool = False
    generator_lr: float = 1e-3
    discriminator_lr: float = 1e-4
    beta1: float = 0.5
    noise_size: int = 256
    width: int = 128  # of both networks
    radius: float = 2.0
    deviation: float = 0.02
    samples: int = 2500
    evaluate_every: int = 100
    device: str = "cpu"
    pairs: int = 3000
    batch_size: int = 512
    first_seed: int = 0
    seeds: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        cli.check(self, pairs="iterations")

    @property
    def label(self) -> str:
        """Return the name of the arm in figures."""
        return f"K = {self.unroll_steps}" + ", first term" * self.stop_gradient

    def checkpoint(self, folder: Path) -> Path:
        """Return where the runs are kept."""
        arm = f"{self.activation}-{self.weight_deviation}-K{self.unroll_steps}"
        arm += "-first" * self.stop_gradient
        return folder / "checkpoints" / f"{arm}-seeds{self.first_seed}+{self.seeds}.pt"


PRESETS = {
    "quick": Config(
        "quick",
        generator_lr=3e-3,
        discriminator_lr=3e-4,
        noise_size=64,
        width=32,
        evaluate_every=25,
        pairs=1000,
        batch_size=64,
    ),
    "readme": Config("readme"),
}


def weights(deviation: float) -> list[float]:
    """Return the modes' probabilities: uniform draws, normalised, of a given deviation."""
    seed = WEIGHTS[deviation]
    if seed is None:
        return [1 / MODES] * MODES
    drawn = torch.rand(MODES, generator=torch.Generator().manual_seed(seed))
    shares: list[float] = (drawn / drawn.sum()).tolist()
    return shares


def data(config: Config) -> Mixture:
    """Return the ring with its weights."""
    return ring(
        MODES,
        radius=config.radius,
        deviation=config.deviation,
        weights=weights(config.weight_deviation),
        device=config.device,
    )


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
        seeds.perceptrons([config.noise_size, *hidden, 2], config.activation, rngs),
        seeds.perceptrons([2, *hidden, 1], "relu", rngs),
        unroll.NonSaturating(),
        rates=(config.generator_lr, config.discriminator_lr),
        betas=(config.beta1, 0.999),
    )
    unrolled = unroll.UnrolledGeneratorLoss(
        players.discriminator,
        players.d_optimizer,
        players.game,
        unroll_steps=config.unroll_steps,
        stop_gradient=config.stop_gradient,
    )
    label = f"{config.activation} {config.weight_deviation}, {config.label}"
    for _ in players.iterate(folder, resume=resume, label=label, line=line):
        players.train_discriminator()
        players.follow(unrolled(players.fake(), players.real()))
    return config


record_rows = partial(seeds.record_rows, "mog_nonuniform")


def report(args: argparse.Namespace, configs: Sequence[Config]) -> None:
    """Write the time series and the figures, and print the tables."""
    folder = args.figures or args.out
    everything = {}
    for activation, deviation in dict.fromkeys((c.activation, c.weight_deviation) for c in configs):
        arms = [c for c in configs if (c.activation, c.weight_deviation) == (activation, deviation)]
        logs = {c.label: runs.read_log(c.checkpoint(args.out)) for c in arms}
        everything |= {f"{activation} {deviation}, {k}": log for k, log in logs.items()}
        planar.report(
            f"mog_nonuniform_{activation}_{deviation}",
            logs,
            data(arms[0]),
            folder=folder,
            seed=arms[0].first_seed,
            caption=f"preset {arms[0].preset}, {activation}, weights of deviation {deviation}",
        )
    seeds.write_series(args.out, everything, configs[0].first_seed)
    cli.written(args, folder)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    cli.add_unroll_steps(add, 0, 10)
    add(
        "--gradients",
        nargs="+",
        choices=("full", "first"),
        default=("full", "first"),
        help="full: both terms of Eq. 12. first: the first alone, as the README's code computes; "
        "at K=0 they are the same and trained once (default: both)",
    )
    add = parser.add_argument_group("the experiment").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="readme: the README's code. quick (default): three times its learning rates, 1,000 "
        "pairs for 3,000, 32 units a layer for 128, 64 noises for 256, batches of 64 for 512",
    )
    add(
        "--weights",
        type=float,
        nargs="+",
        choices=WEIGHTS,
        default=list(WEIGHTS),
        help="standard deviations of the modes' weights (default: all)",
    )
    add(
        "--activations",
        nargs="+",
        choices=("tanh", "relu"),
        default=["relu"],
        help="of the generator (default: relu)",
    )
    cli.add_iterations(add)
    cli.add_run_flags(parser, "mog_nonuniform", seeds=10, figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    base = cli.chosen(given, PRESETS)
    arms = [
        {"unroll_steps": k, "stop_gradient": gradient == "first" and k > 0}
        for k in given["steps"]
        for gradient in given["gradients"]
    ]
    settings = [
        replace(base, activation=activation, weight_deviation=deviation, **arm)
        for activation in given["activations"]
        for deviation in given["weights"]
        for arm in arms
    ]
    return list(dict.fromkeys(settings))


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    report(args, cli.carry_out(parser, args, build, train, record_rows))


if __name__ == "__main__":
    main()
