"""Coloured MNIST: how much of a continuous distribution of colours the generator covers.

Section 3.3.2, Table 2 and Appendix F of Metz et al., "Unrolled Generative Adversarial Networks"
(https://arxiv.org/abs/1611.02163): each digit has one colour, normal with deviation 0.5. The colour
of a generated digit is found by k-means, and the JS divergence between the colours of data and of
samples is that of their Gaussian kernel densities. The claim: with 5 or 10 steps of looking ahead
it is smaller than with none, for networks of each size X.

    python examples/colored_mnist.py                    12 cells at a small scale
    python examples/colored_mnist.py --preset paper     Appendix F (for a GPU)
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import cli, records, runs
from lab.data import colors, digits
from lab.data.pixels import as_bytes
from lab.figures import colored
from lab.networks import dcgan
from lab.trace import Trace
from torch import Tensor

import unroll

SIZES = "1/4", "1/2", "1"


@dataclass(frozen=True)
class Config:
    """One run. The defaults are Appendices D and F; "ours" marks a choice where they are silent."""

    preset: str = "paper"
    size: str = "1"  # X, of both networks
    base: str = "1"  # the width that X is a part of, in the paper's
    unroll_steps: int = 0
    generator_lr: float = 1e-4
    discriminator_lr: float = 2e-4
    beta1: float = 0.5  # that of Appendices A and C
    noise_size: int = 256
    samples: int = 10_000  # ours, behind every metric; as many digits of the data
    evaluate_every: int = 2500
    device: str = "cpu"
    seed: int = 0
    pairs: int = 50_000  # of updates, D first (ours): the 100,000 updates of Appendix D
    batch_size: int = 128  # PacGAN's

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        cli.check(self, pairs="iterations")
        if self.samples < 10:
            raise ValueError(f"--samples must be at least 10, got {self.samples}")

    @property
    def label(self) -> str:
        """Return the name of the setting in tables."""
        return f"X = {self.size}, K = {self.unroll_steps}"

    def checkpoint(self, folder: Path) -> Path:
        """Return where the run is kept."""
        size = self.size.replace("/", "of")
        return folder / "checkpoints" / f"X{size}-K{self.unroll_steps}-seed{self.seed}.pt"


PRESETS = {
    "small": Config(
        "small",
        base="1/4",
        generator_lr=2e-3,
        discriminator_lr=2e-3,
        samples=1000,
        evaluate_every=250,
        pairs=1500,
        batch_size=16,
    ),
    "paper": Config("paper"),
}


def train(
    config: Config, line: int, *, folder: Path, resume: bool, data_root: Path | None = None
) -> Config:
    """Train one GAN; what comes of it is in its checkpoint."""
    torch.set_num_threads(1)  # a process a core
    rng = torch.Generator(config.device).manual_seed(config.seed)
    data = digits.mnist(data_root, size=32).to(config.device)
    width = float(Fraction(config.size) * Fraction(config.base))
    generator = dcgan.generator(width, rng, noise_size=config.noise_size)
    discriminator = dcgan.discriminator(width, rng)
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(generator.parameters(), config.generator_lr, betas)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), config.discriminator_lr, betas)
    trace = Trace("d_loss", "g_loss", "data_seconds", "seconds")

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, config.noise_size, generator=rng, device=config.device)

    def real(count: int = config.batch_size) -> Tensor:
        return colors.coloured(data.sample(count, rng), colors.draw(count, rng), rng)

    held_out = noise(config.samples)
    of_data, again = (colors.foreground(real(config.samples)) for _ in range(2))
    single = of_data.mean(0).expand(config.samples, 3)
    references = {
        "js_floor": colors.js_divergence(of_data, again),
        "js_single_colour": colors.js_divergence(of_data, single),
        "discarded_data": 1 - len(of_data) / config.samples,
    }

    @torch.no_grad()
    def evaluate(
        pairs: int, history: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        generator.eval()
        images = torch.cat([generator(z) for z in held_out.split(colors.CHUNK)])
        generator.train()
        found = colors.foreground(images)
        start = history[-1]["pairs"] if history else 0
        spread = found.var(0).sum() if len(found) > 1 else torch.zeros(())
        row = {
            "player_updates": 2 * pairs,
            "js_divergence": colors.js_divergence(of_data, found),
            "discarded": 1 - len(found) / config.samples,
            "colour_variance": (spread / of_data.var(0).sum()).item(),
            "d_loss": trace.mean("d_loss", start),
            "g_loss": trace.mean("g_loss", start),
            "seconds_a_pair": trace.median("seconds"),
            "data_seconds_a_pair": trace.median("data_seconds"),
        }
        snapshot = {
            "images": as_bytes(images[:16]).cpu(),
            "colours": found[:1000].clone().cpu(),
        }
        return row | references, snapshot

    iterations = runs.iterate(
        config.checkpoint(folder),
        asdict(config),
        {
            "g": generator,
            "d": discriminator,
            "g_adam": g_optimizer,
            "d_adam": d_optimizer,
            "trace": trace,
        },
        rng,
        evaluate,
        length=config.pairs,
        every=config.evaluate_every,
        resume=resume,
        bar={"desc": f"{config.label} seed {config.seed}", "position": line, "unit": "pair"},
    )

    game = unroll.NonSaturating()
    unrolled = unroll.UnrolledGeneratorLoss(
        discriminator, d_optimizer, game, unroll_steps=config.unroll_steps
    )
    for _ in iterations:
        began = time.process_time()
        d_images = real()
        g_images = real() if config.unroll_steps else d_images  # f_0 uses none
        data_seconds = time.process_time() - began
        d_loss = game.discriminator_loss(discriminator, generator(noise()).detach(), d_images)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()

        g_loss = unrolled(generator(noise()), g_images)
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        seconds = time.process_time() - began
        trace.add(d_loss=d_loss, g_loss=g_loss, data_seconds=data_seconds, seconds=seconds)
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of a finished run: its settings, its last metrics, their provenance."""
    result = log["history"][-1]
    rate = config.batch_size / result["seconds_a_pair"]
    return [records.row("colored_mnist", config, {**result, "images_a_second": rate}, log)]


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    add(
        "--sizes",
        nargs="+",
        choices=SIZES,
        default=list(SIZES),
        help="X, which scales both networks; at 1 they are those of Appendix D (default: all)",
    )
    cli.add_unroll_steps(add, 0, 1, 5, 10)
    add = parser.add_argument_group("the experiment").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="small",
        help="paper: Appendix F. small (default): X is a part of a quarter of its widths, learning "
        "rates 2e-3, batches of 16 for 128, 1,500 pairs for 50,000, 1,000 samples for 10,000",
    )
    add("--generator-lr", type=float, metavar="ETA", help="Adam's learning rate for G")
    add("--discriminator-lr", type=float, metavar="ETA", help="and for D, real or unrolled steps")
    cli.add_iterations(add)
    add("--batch-size", type=cli.positive, metavar="N", help="default: the preset's")
    add("--evaluate-every", type=cli.positive, metavar="PAIRS", help="default: the preset's")
    add("--samples", type=int, metavar="N", help="behind every metric (default: the preset's)")
    digits.add_data_flag(parser)
    cli.add_run_flags(parser, "colored_mnist", figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the runs that the command line asks for."""
    base = cli.chosen(given, PRESETS)
    return [
        replace(base, size=size, unroll_steps=k, seed=seed)
        for seed in range(given["seed"], given["seed"] + given["seeds"])
        for k in dict.fromkeys(given["steps"])
        for size in dict.fromkeys(given["sizes"])
    ]


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    try:
        digits.mnist(args.data_root)
    except (OSError, RuntimeError) as error:
        parser.error(str(error))
    task = partial(train, data_root=args.data_root)
    configs = cli.carry_out(parser, args, build, task, record_rows, keep=True)
    colored.report(args.out, args.figures or args.out, configs, args.data_root)


if __name__ == "__main__":
    main()
