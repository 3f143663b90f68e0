"""What one would pick instead of unrolling, on a ring and a grid of Gaussians, and both together.

Every method has the networks, the learning rate, the batch size and the number of generator updates
of the others, and what makes it that method from its own paper or code:

    GAN         the minimax game of Metz et al. 2017 (https://arxiv.org/abs/1611.02163)
    GAN-NS      the same with the non-saturating loss (Goodfellow et al. 2014)
    PacGAN2     Lin et al. 2018 (https://arxiv.org/abs/1712.04086): GAN-NS whose D judges two
                samples at once, in batches of as many pairs as other D's judge samples, as in the
                authors' code
    grad-norm   Nagarajan and Kolter 2017 (https://arxiv.org/abs/1706.04156): G minimises
                f + 0.5 ||df/dtheta_D||^2, 0.5 as in the authors' code. It is the first-order term
                of one look-ahead step of plain SGD of that learning rate
    WGAN-GP     Gulrajani et al. 2017 (https://arxiv.org/abs/1704.00028): five critic steps; the
                penalty's weight is the paper's 10, or the 0.1 of the authors' code for 2D toys,
                whose betas (0.5, 0.9) both have
    RpGAN+R1+R2 Huang et al. 2024 (https://arxiv.org/abs/2501.05441): pairs and both penalties, no
                momentum; gamma is 1 or 0.1, the ends of the authors' schedule for Stacked MNIST

The rest of the optimizer is Adam with betas (0.5, 0.999). With K > 0 the generator's loss is the
method's own at the discriminator K steps ahead, whose loss has the method's penalties.

    python examples/mog_rivals.py                       all methods, K=0 and K=5, 1,500 updates of G
    python examples/mog_rivals.py --methods GAN PacGAN2 --data ring
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import cli, planar, records, runs, seeds
from lab.data.mixtures import CEILING, TABLE, Mixture, grid, ring
from lab.figures import costs, plots
from lab.networks.perceptrons import Scale
from torch import Tensor, nn

import unroll


@dataclass(frozen=True)
class Method:
    """What a method changes about the plain game."""

    game: unroll.Objective
    betas: tuple[float, float] = (0.5, 0.999)
    discriminator_steps: int = 1  # a step of G
    packing: int = 1
    gradient_norm: float = 0.0  # the weight of ||df/dtheta_D||^2 in G's loss


WGAN_GP = partial(Method, betas=(0.5, 0.9), discriminator_steps=5)
RPGAN = partial(Method, betas=(0.0, 0.99))
METHODS = {
    "GAN": Method(unroll.Minimax()),
    "GAN-NS": Method(unroll.NonSaturating()),
    "PacGAN2": Method(unroll.NonSaturating(), packing=2),
    "grad-norm": Method(unroll.Minimax(), gradient_norm=0.5),
    "WGAN-GP 10": WGAN_GP(unroll.Wasserstein() + unroll.GradientPenalty(10.0)),
    "WGAN-GP 0.1": WGAN_GP(unroll.Wasserstein() + unroll.GradientPenalty(0.1)),
    "RpGAN+R1+R2 1": RPGAN(unroll.RelativisticPairing() + unroll.R1(1.0) + unroll.R2(1.0)),
    "RpGAN+R1+R2 0.1": RPGAN(unroll.RelativisticPairing() + unroll.R1(0.1) + unroll.R2(0.1)),
}


@dataclass(frozen=True)
class Config:
    """Runs of one setting, the seeds side by side."""

    preset: str = "full"
    data: str = "ring"
    method: str = "GAN"
    unroll_steps: int = 0
    learning_rate: float = 1e-4  # of both players
    noise_size: int = 256
    width: int = 128  # of two hidden ReLU layers in either network
    input_scale: float = 0.25  # of D
    samples: int = 2500
    evaluate_every: int = 500
    device: str = "cpu"
    pairs: int = 25_000  # updates of G
    batch_size: int = 512
    first_seed: int = 0
    seeds: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        cli.check(self, pairs="iterations", learning_rate="learning-rate")

    @property
    def label(self) -> str:
        """Return the name of the setting."""
        return f"{self.method}, K = {self.unroll_steps}"

    def checkpoint(self, folder: Path) -> Path:
        """Return where the runs are kept."""
        setting = f"{self.data}-{self.method.replace(' ', '-')}-K{self.unroll_steps}"
        name = f"{setting}-lr{self.learning_rate:g}-seeds{self.first_seed}+{self.seeds}.pt"
        return folder / "checkpoints" / name


PRESETS = {
    "quick": Config(
        "quick",
        learning_rate=1e-3,
        noise_size=64,
        width=64,
        evaluate_every=100,
        pairs=1500,
        batch_size=128,
    ),
    "full": Config("full"),
}


def mixture_of(config: Config) -> Mixture:
    """Return the paper's ring of eight, or the grid of VEEGAN and PacGAN."""
    if config.data == "grid":
        return grid(radius=4.0, deviation=0.05, device=config.device)
    return ring(radius=2.0, deviation=0.02, device=config.device)


class Discriminators(nn.Module):
    """The D of every seed, on a plain batch: the first seed's samples first.

    Args:
        config: Of the experiment.
        packing: How many samples of a seed make one input.
        rngs: Of the seeds.
    """

    def __init__(self, config: Config, packing: int, rngs: seeds.Generators) -> None:
        super().__init__()
        self.shape = config.seeds, -1, 2 * packing
        sizes = [2 * packing, config.width, config.width, 1]
        layers = seeds.perceptrons(sizes, "relu", rngs)
        self.layers = nn.Sequential(Scale(config.input_scale), layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layers(x.reshape(self.shape).mT)
        return logits.flatten()


def train(config: Config, line: int, *, folder: Path, resume: bool) -> Config:
    """Train the GANs of all seeds; what comes of them is in their checkpoint."""
    torch.set_num_threads(1)  # the networks are tiny
    method = METHODS[config.method]
    rngs = seeds.generators(config)
    players = planar.Players(
        config,
        rngs,
        mixture_of(config),
        partial(rngs.normal, config.noise_size),
        seeds.perceptrons([config.noise_size, config.width, config.width, 2], "relu", rngs),
        Discriminators(config, method.packing, rngs),
        method.game,
        rates=(config.learning_rate, config.learning_rate),
        betas=method.betas,
    )
    players.batch_size *= method.packing
    players.updates = 1 + method.discriminator_steps

    def pair() -> Iterator[Tensor]:
        """Return generated samples and data, the first seed's first."""
        return (x.mT.flatten(0, 1) for x in (players.fake(), players.real()))

    ticked = time.process_time()

    def evaluate(pairs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        nonlocal ticked
        spent, ticked = time.process_time() - ticked, time.process_time()
        row, snapshot = players.evaluate(pairs, earlier)
        before = earlier[-1]["cpu_seconds"] if earlier else 0.0
        return row | {"cpu_seconds": round(before + spent, 1)}, snapshot

    unrolled = unroll.UnrolledGeneratorLoss(
        players.discriminator, players.d_optimizer, players.game, unroll_steps=config.unroll_steps
    )
    label = f"{config.data}, {config.label}"
    iterations = players.iterate(folder, resume=resume, label=label, line=line, evaluate=evaluate)
    for iteration in iterations:
        torch.manual_seed(iteration)  # GradientPenalty's points: the same in a resumed run
        for _ in range(method.discriminator_steps):
            players.train_discriminator(*pair())

        weight = method.gradient_norm
        players.follow(regularised(unrolled, *pair(), weight) if weight else unrolled(*pair()))
    return config


def regularised(
    unrolled: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor, weight: float
) -> Tensor:
    """Return G's loss and the squared norm of its gradient in theta_D, both K steps ahead."""
    ahead = unrolled.unroll(fake, real)
    # At K = 0 they are constants.
    theta = [p if p.requires_grad else p.requires_grad_() for p in ahead.parameters.values()]
    loss = unrolled.objective.generator_loss(ahead, fake, real)
    gradients = torch.autograd.grad(loss, theta, create_graph=True)
    return loss + weight * sum(gradient.square().sum() for gradient in gradients)


record_rows = partial(seeds.record_rows, "mog_rivals")


def report(args: argparse.Namespace, configs: Sequence[Config]) -> None:
    """Write the time series and the figures, and print the tables."""
    folder = args.figures or args.out
    everything, panels = {}, {}
    for data in dict.fromkeys(config.data for config in configs):
        own = [config for config in configs if config.data == data]
        logs = {c.label: runs.read_log(c.checkpoint(args.out)) for c in own}
        histories = {label: seeds.histories(log) for label, log in logs.items()}
        print(f"\nThe {data}; perfect samples have {CEILING:.2f} % high quality (HQ).\n")
        print(records.table(histories, {**TABLE, "cpu_seconds": "CPU seconds"}))
        everything |= {f"{data}, {label}": log for label, log in logs.items()}
        lines: dict[str, list[Any]] = {config.method: [] for config in own}
        for config in own:
            last = [history[-1] for history in histories[config.label]]
            lines[config.method].append((last[0]["cpu_seconds"], [row["modes"] for row in last]))
        panels[f"the {data}"] = lines
        draw(folder / f"mog_rivals_{data}.png", own, logs)
    seconds = f"CPU seconds of {configs[0].seeds} seeds"
    path = folder / "mog_rivals_costs.png"
    costs.chart(path, panels, seconds=seconds, metric="modes covered", hollow=True)
    seeds.write_series(args.out, everything, configs[0].first_seed)
    cli.written(args, folder)


def draw(path: Path, configs: Sequence[Config], logs: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the first seed's samples at the end, a row a K and a column a method."""
    first, mixture = configs[0], mixture_of(configs[0])
    methods = list(dict.fromkeys(config.method for config in configs))

    def samples(method: str, k: int) -> Tensor:
        label = replace(first, method=method, unroll_steps=k).label
        last: Tensor = logs[label]["snapshots"][-1][0]
        return last

    plots.heat_maps(
        path,
        {
            f"K = {k}": [samples(method, k) for method in methods]
            for k in dict.fromkeys(config.unroll_steps for config in configs)
        },
        [method.replace(" ", "\n") for method in methods],
        mixture.sample(first.samples, torch.Generator().manual_seed(first.first_seed)),
        extent=1.25 * mixture.means.abs().max().item(),
        caption=f"after {first.pairs:,} updates of G (preset {first.preset}, "
        f"seed {first.first_seed})",
    )


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    text = "look-ahead steps of D in the generator's loss; 0 is the method alone"
    cli.add_unroll_steps(add, 0, 5, text=text)
    add = parser.add_argument_group("the experiment").add_argument
    add("--data", dest="mixtures", nargs="+", choices=("ring", "grid"), default=["ring", "grid"])
    add(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="full: the widths, learning rates, batches and length of the unrolled paper's "
        "Appendix A. quick (default): 64 units a layer for 128, batches of 128 for 512, learning "
        "rates of 1e-3 for 1e-4, 1,500 updates of G for 25,000",
    )
    add("--learning-rate", type=float, metavar="ETA", help="of both players")
    cli.add_iterations(add, "updates of G", metavar="N")
    cli.add_run_flags(parser, "mog_rivals", seeds=10, figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    base = cli.chosen(given, PRESETS)
    return [
        replace(base, data=data, method=method, unroll_steps=k)
        for data in given["mixtures"]
        for k in given["steps"]
        for method in given["methods"]
    ]


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    report(args, cli.carry_out(parser, args, build, train, record_rows))


if __name__ == "__main__":
    main()
