"""A thousand modes: GANs with a small discriminator on stacks of three digits.

Section 3.3.1, Table 1 and Appendix E of https://arxiv.org/abs/1611.02163. An image has a random
digit of MNIST in each colour, 1,000 modes in all; 25,600 samples are told apart by the classifier
of `train_classifier.py`. D is a half or a quarter as wide as G is. Claims: ten look-ahead steps
cover more modes than none at both sizes, with a lower KL(model || data); the benefit grows as D
shrinks; networks of Appendix D's size cover all modes even with K=0.

Presets: `paper` has the networks and sizes of Appendix E and the rates and length of Appendix D,
since E has none of its own; `long` lasts as long as PacGAN's re-run of it; `small` is `paper` with
rates and batches with which a few hundred pairs on a CPU tell something.

    python examples/stacked_mnist.py                                  K=0 and K=10 at both sizes
    python examples/stacked_mnist.py --preset paper --unroll-steps 0 1 5 10 --seeds 10 --record
    python examples/stacked_mnist.py --networks D --sizes 1 --unroll-steps 0
    python examples/stacked_mnist.py --data-score --record            the score of real stacks
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import cli, records, runs
from lab.data import digits
from lab.data.pixels import as_bytes, as_floats
from lab.figures import pictures, stacked
from lab.metrics import classifier, coverage
from lab.networks import dcgan
from torch import Tensor, nn

import unroll

MODES = 1000
DATA_RECORD = records.RESULTS / "stacked_mnist_data.csv"
WIDTHS = {"E": 1 / 8, "D": 1.0}  # of the appendices' networks, compared to D's


@dataclass(frozen=True)
class Config:
    """One run. "Ours" marks a choice where the paper is silent."""

    preset: str = "paper"
    unroll_steps: int = 10
    networks: str = "E"  # the appendix
    size: float = 0.25  # X: of D compared to G
    image_size: int = 28  # PacGAN's; the strides alone make 32, of which the middle is taken
    noise_size: int = 256
    generator_lr: float = 1e-4  # this and the next of Appendix D
    discriminator_lr: float = 2e-4
    beta1: float = 0.5  # that of Appendices A and C
    samples: int = 25_600  # behind the metrics at the end, as in the paper
    curve_samples: int = 2_560  # behind those over training
    classifier: str = ""  # the hash of the one that tells them apart
    evaluate_every: int = 2000  # pairs
    device: str = "cpu"
    seed: int = 0
    pairs: int = 50_000  # of updates, D first (ours); Appendix D counts 100,000 single ones
    batch_size: int = 128  # PacGAN's

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.size <= 0 or (64 * WIDTHS[self.networks] * self.size) % 1:
            least = Fraction(1 / 64 / WIDTHS[self.networks])
            raise ValueError(f"--sizes must be multiples of {least} above zero, got {self.size}")
        rates = {"generator_lr": "generator-lr", "discriminator_lr": "discriminator-lr"}
        cli.check(self, pairs="iterations", samples="samples", **rates)

    @property
    def label(self) -> str:
        """Return the name of the arm in figures."""
        small = f"D = {Fraction(self.size)}" if self.networks == "E" else "App. D"
        return f"{small}, K = {self.unroll_steps}"

    def checkpoint(self, folder: Path) -> Path:
        """Return where the run is kept."""
        name = f"{self.preset}-{self.networks}-X{self.size:g}-K{self.unroll_steps}"
        return folder / "checkpoints" / f"{name}-batch{self.batch_size}-seed{self.seed}.pt"


PRESETS = {
    "paper": Config(),
    "long": Config("long", pairs=500_000),  # PacGAN's length
    "small": Config(
        "small",
        generator_lr=4e-3,
        discriminator_lr=4e-3,
        batch_size=16,
        pairs=500,
        evaluate_every=125,
    ),
}


def networks(config: Config, rng: torch.Generator) -> tuple[nn.Sequential, nn.Sequential]:
    """Return G and D."""
    width = WIDTHS[config.networks]
    generator = dcgan.generator(width, rng, noise_size=config.noise_size)
    if config.image_size == 28:
        generator.append(nn.ZeroPad2d(-2))  # cut to the digits' size
    return generator, dcgan.discriminator(width * config.size, rng)


@torch.no_grad()
def generated(network: nn.Module, noise: Tensor) -> Tensor:
    """Return samples, with BatchNorm's running statistics."""
    network.eval()
    images = torch.cat([network(part) for part in noise.split(128)])
    network.train()
    return images


def train(
    config: Config,
    line: int,
    *,
    folder: Path,
    resume: bool,
    data_root: Path | None = None,
    classifier_file: Path | None = None,
) -> Config:
    """Train one GAN; what comes of it is in its checkpoint."""
    torch.set_num_threads(1)  # the networks are tiny
    rng = torch.Generator(config.device).manual_seed(config.seed)
    data = digits.mnist(data_root, size=config.image_size).to(config.device)
    judge = classifier.load(classifier_file, config.device)
    g, d = networks(config, rng)
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(g.parameters(), config.generator_lr, betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.discriminator_lr, betas)

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, config.noise_size, generator=rng, device=config.device)

    def real() -> Tensor:
        return data.stacks(config.batch_size, rng)

    held_out = noise(config.samples)

    def evaluate(pairs: int, _: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        count = config.samples if pairs == config.pairs else config.curve_samples
        images = generated(g, held_out[:count])
        labels = coverage.stack_labels(classifier.classify(judge, images))
        curve = coverage.mode_metrics(labels[: config.curve_samples], MODES)
        whole = coverage.mode_metrics(labels, MODES)
        row = {name: value if pairs == config.pairs else "" for name, value in whole.items()}
        row |= {f"curve_{name}": value for name, value in curve.items()}
        return {"player_updates": 2 * pairs, **row}, as_bytes(images[:16]).cpu()

    iterations = runs.iterate(
        config.checkpoint(folder),
        asdict(config),
        {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer},
        rng,
        evaluate,
        length=config.pairs,
        every=config.evaluate_every,
        resume=resume,
        bar={"desc": f"{config.label}, seed {config.seed}", "position": line, "unit": "pair"},
    )

    game = unroll.NonSaturating()
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, unroll_steps=config.unroll_steps)
    for _ in iterations:
        d_loss = game.discriminator_loss(d, g(noise()).detach(), real())
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()

        g_loss = unrolled(g(noise()), real())  # a fresh batch (ours)
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of a finished run: a row an evaluation, so that lengths compare.

    The metrics of all samples are in the last one.
    """
    settings = asdict(config)
    device = settings.pop("device")
    rows = [row for row in log["history"] if row["pairs"]]
    about = {"device": device, **log["provenance"]}
    return [{"experiment": "stacked_mnist", **settings, **row, **about} for row in rows]


def data_score(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Print the score of real stacks through the same classifier, and record it."""
    try:
        judging, data = classifier.load(args.classifier), digits.mnist(args.data_root)
    except (OSError, RuntimeError) as error:
        parser.error(str(error))
    facts = classifier.facts(args.classifier)
    for seed in range(args.seed, args.seed + args.seeds):
        rng = torch.Generator().manual_seed(seed)
        count = args.samples or Config.samples
        labels = classifier.classify(judging, data.stacks(count, rng))
        row = {
            "experiment": "stacked_mnist_data",
            "samples": count,
            "seed": seed,
            **coverage.mode_metrics(coverage.stack_labels(labels), MODES),
            "classifier": facts["hash"],
            "test_accuracy": facts["test_accuracy"],
            **runs.provenance(),
        }
        print(f"seed {seed}: {row['modes']} modes, reverse KL {row['reverse_kl']:.4f}")
        if args.record is not None:
            path = args.record.with_name(DATA_RECORD.name)
            records.append(path, row, key=("samples", "seed", "classifier"))


def report(folder: Path, figures: Path, configs: Sequence[Config]) -> None:
    """Print the table, and draw samples of each arm's first seed over training."""
    histories: dict[str, list[Any]] = {}
    images: dict[str, list[Tensor]] = {}
    for config in configs:
        log = runs.read_log(config.checkpoint(folder))
        histories.setdefault(config.label, []).append(log["history"])
        images.setdefault(config.label, log["snapshots"])
    print(records.table(histories, {"modes": "modes", "reverse_kl": "reverse KL"}))
    first = configs[0]
    history = histories[first.label][0]
    moments = pictures.spread(len(history), 5)
    pictures.grid(
        figures / f"stacked_mnist_{first.preset}_{first.networks}.png",
        {name: [as_floats(cells[i]) for i in moments] for name, cells in images.items()},
        [f"{history[i]['pairs']:,}" for i in moments],
        caption=f"pairs of updates (preset {first.preset}, seed {first.seed})",
    )


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the experiment").add_argument
    add("--preset", choices=PRESETS, default="small", help="default: small")
    cli.add_unroll_steps(add, 0, 10)
    add("--sizes", type=Fraction, nargs="+", default=[Fraction(1, 4), Fraction(1, 2)], metavar="X",
        help="of D compared to G (default: 1/4 1/2)")  # fmt: skip
    add("--networks", choices=WIDTHS, help="the appendix: E (default), or D, 8 times as wide")
    add("--image-size", type=int, choices=digits.SIZES, help="default: 28")
    add("--generator-lr", type=float, metavar="ETA", help="Adam's learning rate for G")
    add("--discriminator-lr", type=float, metavar="ETA", help="and for D, real or unrolled steps")
    add("--batch-size", type=cli.positive, metavar="N", help="default: the preset's")
    cli.add_iterations(add)
    add("--samples", type=int, metavar="N", help="behind every metric (default: 25600)")
    add("--evaluate-every", type=cli.positive, metavar="PAIRS", help="default: the preset's")
    add("--data-score", action="store_true", help="score real stacks, and train nothing")
    digits.add_data_flag(parser)
    classifier.add_classifier_flag(parser)
    cli.add_run_flags(parser, "stacked_mnist", figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the runs that the command line asks for."""
    file = given.get("classifier")
    digits.mnist(given.get("data_root"))  # before any work
    classifier.load(file)
    base = replace(cli.chosen(given, PRESETS), classifier=classifier.facts(file)["hash"])
    return [
        replace(base, unroll_steps=k, size=float(size), seed=seed)
        for seed in range(given["seed"], given["seed"] + given["seeds"])
        for size in dict.fromkeys(given["sizes"])
        for k in dict.fromkeys(given["steps"])
    ]


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    if args.data_score:
        data_score(parser, args)
        return
    work = partial(train, data_root=args.data_root, classifier_file=args.classifier)
    configs = cli.carry_out(parser, args, build, work, record_rows, keep=True)
    figures = args.figures or args.out
    report(args.out, figures, configs)
    if args.record is not None:
        stacked.curves(args.record, figures / "stacked_mnist_curves.png")


if __name__ == "__main__":
    main()
