"""GANs on a 2D mixture of 8 Gaussians, without and with unrolling.

Section 3.1, Fig. 2 and Appendix A of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163). Without unrolling (K=0) the
generator rotates through the modes; with K=10 it spreads over all of them.

    python examples/mog.py                              K=0 and K=10, in about three minutes
    python examples/mog.py --preset paper --seeds 10    Appendix A, over ten seeds
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import cli, records, runs
from lab.data.mixtures import CEILING, CURVES, TABLE, mode_metrics, ring, rotation
from lab.figures import plots
from lab.networks.perceptrons import ACTIVATIONS, Scale, perceptron
from torch import Tensor, nn

import unroll

MODES = 8


@dataclass(frozen=True)
class Config:
    """One run. The defaults are Appendix A; "ours" marks a choice where the paper is silent."""

    preset: str = "paper"
    unroll_steps: int = 10
    stop_gradient: bool = False
    average: bool = False
    resample: bool = False
    generator_steps: int = 1
    discriminator_steps: int = 1
    activation: str = "relu"
    generator_lr: float = 1e-4
    discriminator_lr: float = 1e-4
    beta1: float = 0.5
    gain: float = 0.8  # of the orthogonal weights; biases start at zero (ours)
    noise_size: int = 256
    width: int = 128  # of D too (ours)
    discriminator_layers: int = 1
    input_scale: float = 0.25
    radius: float = 2.0
    deviation: float = 0.02
    samples: int = 2500  # behind every metric, as in VEEGAN and PacGAN
    evaluate_every: int = 250
    device: str = "cpu"
    seed: int = 0
    pairs: int = 25_000  # of updates, D first (ours); 50,000 updates as in Figs. App.1-App.4
    batch_size: int = 512  # ours

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.unroll_steps < 0:
            raise ValueError(f"--unroll-steps must not be negative, got {self.unroll_steps}")
        for name, value in asdict(self).items():
            if name.endswith(("r_steps", "_lr", "samples", "pairs")) and value <= 0:
                flag = name.replace("pairs", "iterations").replace("_", "-")
                raise ValueError(f"--{flag} must be positive, got {value}")

    def checkpoint(self, folder: Path) -> Path:
        """Return where the run is kept."""
        return folder / "checkpoints" / f"K{self.unroll_steps}-seed{self.seed}.pt"


PRESETS = {
    "quick": Config(
        "quick",
        generator_lr=1e-3,
        discriminator_lr=1e-3,
        batch_size=256,
        pairs=3500,
        evaluate_every=50,
    ),
    "paper": Config("paper"),
    "notebook": Config(
        "notebook",
        activation="tanh",
        generator_lr=1e-3,
        gain=1.4,
        discriminator_layers=2,
        input_scale=1.0,
        radius=1.0,
        deviation=0.01,
    ),
}


def train(config: Config, line: int, *, folder: Path, resume: bool) -> Config:
    """Train one GAN; what comes of it is in its checkpoint."""
    torch.set_num_threads(1)  # the networks are tiny
    rng = torch.Generator(config.device).manual_seed(config.seed)
    mixture = ring(MODES, radius=config.radius, deviation=config.deviation, device=config.device)
    layers = partial(perceptron, activation=config.activation, gain=config.gain, rng=rng)
    hidden = [config.width] * config.discriminator_layers
    generator = layers([config.noise_size, config.width, config.width, 2])
    discriminator = nn.Sequential(Scale(config.input_scale), layers([2, *hidden, 1]))
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(generator.parameters(), config.generator_lr, betas)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), config.discriminator_lr, betas)

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, config.noise_size, generator=rng, device=config.device)

    def real() -> Tensor:
        return mixture.sample(config.batch_size, rng)

    held_out = noise(config.samples)

    @torch.no_grad()
    def evaluate(pairs: int, history: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        samples = generator(held_out)
        updates = pairs * (config.generator_steps + config.discriminator_steps)
        row = {"player_updates": updates, **mode_metrics(samples, mixture)}
        return row | rotation([*history, row]), samples.cpu()

    iterations = runs.iterate(
        config.checkpoint(folder),
        asdict(config),
        {"g": generator, "d": discriminator, "g_adam": g_optimizer, "d_adam": d_optimizer},
        rng,
        evaluate,
        length=config.pairs,
        every=config.evaluate_every,
        resume=resume,
        bar={
            "desc": f"K={config.unroll_steps} seed {config.seed}",
            "position": line,
            "unit": "pair",
        },
    )

    game = unroll.Minimax()
    unrolled = unroll.UnrolledGeneratorLoss(
        discriminator,
        d_optimizer,
        game,
        unroll_steps=config.unroll_steps,
        stop_gradient=config.stop_gradient,
        average=config.average,
    )
    for _ in iterations:
        for _ in range(config.discriminator_steps):
            d_loss = game.discriminator_loss(discriminator, generator(noise()).detach(), real())
            d_optimizer.zero_grad()
            d_loss.backward()
            d_optimizer.step()

        for _ in range(config.generator_steps):
            fresh = ((generator(noise()), real()) for _ in range(config.unroll_steps))
            minibatches = fresh if config.resample else None
            g_loss = unrolled(generator(noise()), real(), minibatches=minibatches)
            g_optimizer.zero_grad()
            g_loss.backward()
            g_optimizer.step()
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of a finished run: its settings, its last metrics, their provenance."""
    return [records.row("mog", config, log["history"][-1], log)]


def report(folder: Path, configs: Sequence[Config]) -> None:
    """Write the time series and the figures, and print the table."""
    histories: dict[str, list[Any]] = {}
    snapshots: dict[str, list[Tensor]] = {}
    series = []
    for config in configs:
        log = runs.read_log(config.checkpoint(folder))
        label = f"K = {config.unroll_steps}"
        histories.setdefault(label, []).append(log["history"])
        snapshots.setdefault(label, log["snapshots"])
        run = {"unroll_steps": config.unroll_steps, "seed": config.seed}
        series += [run | row for row in log["history"]]
    records.write(folder / "metrics.csv", series)

    first = configs[0]
    print(f"\nPreset {first.preset}: {first.pairs:,} pairs of updates, {first.samples:,} samples.")
    print(f"Perfect samples have {MODES} modes and {CEILING:.2f} % high quality (HQ).\n")
    print(records.table(histories, TABLE))

    mixture = ring(MODES, radius=first.radius, deviation=first.deviation)
    data = mixture.sample(first.samples, torch.Generator().manual_seed(first.seed))
    updates = [row["player_updates"] for row in histories[f"K = {first.unroll_steps}"][0]]
    columns = sorted({round(i * (len(updates) - 1) / 6) for i in range(7)})
    plots.heat_maps(
        folder / "heat_maps.png",
        {label: [samples[i] for i in columns] for label, samples in snapshots.items()},
        [f"{updates[i]:,}" for i in columns],
        data,
        extent=1.4 * first.radius,
        caption=f"updates of G and D (preset {first.preset}, seed {first.seed})",
    )
    titles = [f"{update:,} updates of G and D" for update in updates]
    plots.animation(folder / "training.gif", snapshots, titles, data, extent=1.4 * first.radius)
    ideal = {"modes": MODES, "percent_high_quality": CEILING, "largest_mode_share": 1 / MODES}
    plots.curves(folder / "metrics.png", histories, CURVES, x="player_updates", ideal=ideal)
    print(f"\nFigures, time series, settings and checkpoints are in {folder}/")


def arguments() -> argparse.ArgumentParser:
    """Return the command line, explained in the paper's terms."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    text = (
        "look-ahead steps of D in the generator's loss f_K (Eq. 7-9); several are trained side by "
        "side from the same seeds, 0 is the standard GAN"
    )
    cli.add_unroll_steps(add, 0, 10, text=text)
    add(
        "--stop-gradient",
        action="store_true",
        help="only the first term of Eq. 12: G is not told how D would react to it (App. B.2)",
    )
    add(
        "--average",
        action="store_true",
        help="the generator's loss is the mean of f_1..f_K instead of f_K (App. B.2)",
    )
    add(
        "--resample",
        action="store_true",
        help="a fresh minibatch for each of the K steps; the paper, and the default, keep one",
    )
    add(
        "--generator-steps",
        type=int,
        metavar="N",
        help="updates of G a pair; 5 keeps D out of equilibrium, as in Fig. App.4 (default: 1)",
    )
    add(
        "--discriminator-steps",
        type=int,
        metavar="N",
        help="real updates of D a pair: at K=0, the control of Section 2.3, a D that is ahead "
        "without G looking ahead (default: 1)",
    )
    add = parser.add_argument_group("the experiment").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="paper: Appendix A. quick (default): the same, but both learning rates 1e-3 for 1e-4, "
        "batches of 256 for 512 and 3,500 pairs for 25,000, enough to see the effect in about 3 "
        "minutes on two cores. notebook: the authors' notebook (radius 1, deviation 0.01, tanh, "
        "gain 1.4, two hidden layers in D and no scaling of its input, G's learning rate 1e-3; its "
        "K is 5), with 8 distinct modes, where its linspace has the last one on the first, and "
        "with D updated before G, where it updates both at once",
    )
    add("--activation", choices=ACTIVATIONS, help="of both networks (default: the preset's)")
    add("--generator-lr", type=float, metavar="ETA", help="Adam's learning rate for G")
    add("--discriminator-lr", type=float, metavar="ETA", help="and for D, real or unrolled steps")
    text = (
        "pairs of one D and one G update (of N with the options above); the paper counts single "
        "updates, two a pair"
    )
    cli.add_iterations(add, text)
    add("--samples", type=int, metavar="N", help="samples behind every metric (default: 2500)")
    cli.add_run_flags(parser, "mog")
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the runs that the command line asks for."""
    base = cli.chosen(given, PRESETS)
    first = given["seed"]
    return [
        replace(base, unroll_steps=k, seed=seed)
        for k in dict.fromkeys(given["steps"])
        for seed in range(first, first + given["seeds"])
    ]


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    configs = cli.carry_out(parser, args, build, train, record_rows)
    report(args.out, configs)


if __name__ == "__main__":
    main()
