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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lab import cli, planar, records, runs, seeds
from lab.mixtures import Mixture, ring
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
        if self.unroll_steps < 0:
            raise ValueError(f"--unroll-steps must not be negative, got {self.unroll_steps}")
        for name, flag in (("pairs", "iterations"), ("width", "width")):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{flag} must be positive, got {getattr(self, name)}")

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
    rngs = seeds.Generators(
        range(config.first_seed, config.first_seed + config.seeds), config.device
    )
    mixture = data(config)
    hidden = [config.width, config.width]
    generator = seeds.perceptrons([config.noise_size, *hidden, 2], "relu", rngs)
    discriminator = seeds.perceptrons([2, *hidden, 1], "leaky_relu", rngs, last_bias=False)
    betas = (config.beta1, config.beta2)
    g_optimizer = torch.optim.Adam(generator.parameters(), config.generator_lr, betas)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), config.discriminator_lr, betas)

    def noise(count: int = config.batch_size) -> Tensor:
        shape = config.noise_size, count
        return rngs.draw(lambda rng: torch.randn(shape, generator=rng, device=rng.device))

    def sample() -> Tensor:
        return rngs.draw(lambda rng: mixture.sample(config.batch_size, rng).T)

    held_out = noise(config.samples)

    @torch.no_grad()
    def evaluate(pairs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        return planar.evaluate(generator(held_out), mixture, 2 * pairs, earlier)

    iterations = runs.iterate(
        config.checkpoint(folder),
        asdict(config),
        {"g": generator, "d": discriminator, "g_adam": g_optimizer, "d_adam": d_optimizer},
        rngs,
        evaluate,
        length=config.pairs,
        every=config.evaluate_every,
        resume=resume,
        bar={"desc": f"{config.label}, width {config.width}", "position": line, "unit": "pair"},
    )

    game = seeds.SideBySide(GAMES[config.game], config.seeds)
    unrolled = unroll.UnrolledGeneratorLoss(
        discriminator,
        d_optimizer,
        game,
        unroll_steps=config.unroll_steps,
        stop_gradient=config.stop_gradient,
        project=normalised if config.normalise else None,
    )
    for _ in iterations:
        real, z = sample(), noise()
        d_loss = game.discriminator_loss(discriminator, generator(z).detach(), real)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        if config.normalise:
            discriminator.load_state_dict(normalised(discriminator.state_dict()))

        g_loss = unrolled(generator(z), real)
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of finished runs."""
    size = {"pairs": config.pairs, "batch_size": config.batch_size}
    return seeds.record_rows("five_gaussians", config, log, size)


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
    records.write(args.out / "metrics.csv", seeds.series(everything, configs[0].first_seed))
    print(f"\nTime series, settings and checkpoints are in {args.out}/, figures in {folder}/")


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("the method").add_argument
    add(
        "--games",
        nargs="+",
        choices=GAMES,
        default=list(GAMES),
        help="JS: the original GAN, its generator's loss non-saturating as in the authors' code; "
        "Rp: real and fake compared in pairs, their RS-GAN (default: both)",
    )
    add(
        "--unroll-steps",
        dest="steps",
        type=int,
        nargs="+",
        default=[0, 5],
        metavar="K",
        help="look-ahead steps of D in the generator's loss; 0 is the ordinary one (default: 0 5)",
    )
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
    add(
        "--iterations",
        dest="pairs",
        type=int,
        metavar="PAIRS",
        help="of one D and one G update (default: the preset's)",
    )
    cli.add_run_flags(parser, "five_gaussians", seeds=10, figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    known = {name: value for name, value in given.items() if name in Config.__match_args__}
    base = replace(PRESETS[given["preset"]], **known | {"first_seed": given["seed"]})
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
