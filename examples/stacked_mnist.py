"""A thousand modes: GANs with a small discriminator on stacks of three digits.

Section 3.3.1, Table 1 and Appendix E of https://arxiv.org/abs/1611.02163. An image has a random
digit of MNIST in each colour, which makes 1,000 modes. A classifier labels 25,600 samples. D is
half or a quarter as wide as G.

Presets: `paper` has the networks and sizes of Appendix E and the rates and length of Appendix D,
since E states none. `long` is as long as PacGAN's rerun. `small` is `paper` with rates and batches
for a few hundred pairs on a CPU.

Seeds are trained side by side. Each model and its random draws are the same as when trained alone.

    python examples/stacked_mnist.py                                  K = 0 and 10 at both sizes
    python examples/stacked_mnist.py --preset paper --unroll-steps 0 1 5 10 --seeds 10 --record
    python examples/stacked_mnist.py --networks D --size 1 --unroll-steps 0
    python examples/stacked_mnist.py --data-score --record            the score of real stacks
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import torch
from lab import records, runs, seeds, study
from lab.data import digits
from lab.data.pixels import as_bytes
from lab.figures import images
from lab.metrics import classifier, coverage
from lab.networks import dcgan, joined
from torch import Tensor, nn
from tqdm import tqdm

import unroll

MODES = 1000
WIDTHS = {"E": 1 / 8, "D": 1.0}  # of the appendices' networks, compared to D's


@dataclass(frozen=True)
class Config(study.SideBySide):
    """One run. "Ours" marks a choice where the paper is silent."""

    unroll_steps: int = 10  # K, look-ahead steps of D in G's loss
    networks: Literal["E", "D"] = "E"  # the appendix; D is eight times as wide
    size: float = 0.25  # X: the width of D compared to G
    image_size: Literal[28, 32] = 28  # PacGAN's; the strides make 32, of which the middle is taken
    noise_size: int = 256  # of the generator's input
    generator_learning_rate: float = 1e-4  # Adam's, of Appendix D
    discriminator_learning_rate: float = 2e-4  # Adam's, of Appendix D
    beta1: float = 0.5  # that of Appendices A and C
    samples: int = 25_600  # behind the metrics at the end, as in the paper
    curve_samples: int = 2_560  # behind those over training
    compile: bool = True  # compile the look-ahead step and its adjoint
    classifier: str = ""
    evaluate_every: int = 2000  # pairs
    pairs: int = 50_000  # of updates, D first (ours); Appendix D counts 100,000 single ones
    batch_size: int = 128  # PacGAN's

    def __post_init__(self) -> None:
        super().__post_init__()
        if (64 * WIDTHS[self.networks] * self.size) % 1:
            least = Fraction(1 / 64 / WIDTHS[self.networks])
            raise ValueError(f"--size must be a multiple of {least}, got {self.size}")

    @property
    def label(self) -> str:
        small = f"D = {Fraction(self.size)}" if self.networks == "E" else "App. D"
        return f"{small}, K = {self.unroll_steps}"


PAPER = Config()
RATES = {"generator_learning_rate": 4e-3, "discriminator_learning_rate": 4e-3}
PRESETS = {
    "small": replace(PAPER, preset="small", **RATES, batch_size=16, pairs=500, evaluate_every=125),
    "paper": PAPER,
    "long": replace(PAPER, preset="long", pairs=500_000),  # PacGAN's length
}


def networks(config: Config, rng: torch.Generator) -> tuple[nn.Sequential, nn.Sequential]:
    """Return G and D."""
    width = WIDTHS[config.networks]
    generator = dcgan.generator(width, rng, noise_size=config.noise_size)
    if config.image_size == 28:
        generator.append(nn.ZeroPad2d(-2))  # cut to the digits' size
    return generator, dcgan.discriminator(width * config.size, rng)


def train(config: Config, options: classifier.Options, line: int) -> None:
    rngs = seeds.generators(config)
    data = digits.mnist(options.data_root, size=config.image_size).to(config.device)
    judge = classifier.load(options.classifier, config.device)
    g, d = joined.players(rngs, partial(networks, config))
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(g.parameters(), config.generator_learning_rate, betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.discriminator_learning_rate, betas)

    def noise(count: int = config.batch_size) -> Tensor:
        return rngs.normal(count, config.noise_size)

    def real() -> Tensor:
        return joined.last(rngs.draw(partial(data.stacks, config.batch_size)))

    held_out = noise(config.samples)
    known = references(data)

    @torch.no_grad()
    def evaluate(pairs: int, _: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        ends, each = pairs == config.pairs, []
        g.eval()  # with BatchNorm's running statistics (PacGAN: those of the batch)
        for one, z in zip(g, held_out, strict=True):
            parts = z[: config.samples if ends else config.curve_samples].split(128)
            found = torch.cat([classifier.classify(judge, one(part)) for part in parts])
            labels = coverage.stack_labels(found)
            curve = coverage.mode_metrics(labels[: config.curve_samples], MODES)
            whole = coverage.mode_metrics(labels, MODES)
            whole["precision"] = classifier.precision(judge, one(z[: len(known)]), known)
            row = {name: value if ends else "" for name, value in whole.items()}
            each.append(row | {f"curve_{name}": value for name, value in curve.items()})
        shown = g[0](held_out[0, :16])
        g.train()
        return {"player_updates": 2 * pairs, "each": each}, as_bytes(shown).cpu()

    game = seeds.SideBySide(unroll.NonSaturating(), config.seeds)
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **config.look_ahead)
    parts = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    for _ in runs.iterate(config, options, line, parts, rngs, evaluate):
        d_loss = game.discriminator_loss(d, g(noise()).detach(), real())
        study.step(d_optimizer, d_loss)

        g_loss = unrolled(g(noise()), real())  # a fresh batch (ours)
        study.step(g_optimizer, g_loss)


def references(data: digits.Digits) -> Tensor:
    """Return the real stacks that precision is about: the same ones for all models."""
    return data.stacks(classifier.REFERENCES, torch.Generator(data.images.device).manual_seed(0))


def rows(record: str, config: Config, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in study.model_rows(record, config, log) if row["pairs"]]


def report(results: study.Results) -> str:
    curves = {"curve_modes": "modes", "curve_reverse_kl": "reverse KL (nats)"}
    name = f"stacked_mnist_{results.first.preset}_{results.first.networks}"
    images.report(name, results, curves=curves, table=("modes", "reverse_kl"))
    return results.sentence("modes", "covers {} of 1,000 modes")


@dataclass(frozen=True)
class Options(classifier.Options):
    """Whether to score real stacks, the files and the runs."""

    data_score: bool = False  # score real stacks, and train nothing


def arms(configs: Sequence[Config], options: Options) -> list[Config]:
    known = classifier.prepared(options)
    if options.data_score:
        data_score(options, known, configs[0].samples)
        sys.exit()
    return [replace(config, classifier=known["classifier"]) for config in configs]


def data_score(options: Options, facts: Mapping[str, Any], count: int) -> None:
    """Print the score of real stacks through the same classifier, and record it.

    It also scores images whose halves come from two digits. They have strokes but no shape; samples
    that are digits must have more precision.
    """
    judge, data = classifier.load(options.classifier), digits.mnist(options.data_root)
    test, known = digits.mnist(options.data_root, train=False), references(data)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        rng = torch.Generator().manual_seed(seed)
        labels = classifier.classify(judge, data.stacks(count, rng))
        upper, lower, whole = (test.stacks(classifier.REFERENCES, rng) for _ in range(3))
        halves = torch.cat([upper[:, :, :14], lower[:, :, 14:]], 2)
        row = {
            "experiment": "stacked_mnist_data",
            "samples": count,
            "seed": seed,
            **coverage.mode_metrics(coverage.stack_labels(labels), MODES),
            "precision": classifier.precision(judge, whole, known),
            "precision_of_halves": classifier.precision(judge, halves, known),
            "classifier": facts["classifier"],
            "test_accuracy": facts["classifier_accuracy"],
            **runs.provenance(),
        }
        tqdm.write(f"seed {seed}: {row['modes']} modes, reverse KL {row['reverse_kl']:.4f}")
        if options.record:
            path = options.records / "stacked_mnist_data.csv"
            records.append(path, row, key=("samples", "seed", "classifier"))


SWEEP = {"size": (0.25, 0.5), "unroll_steps": (0, 10)}
HOOKS = {"options": Options(), "arms": arms, "rows": rows}
main = partial(study.main, __doc__, PRESETS, train, report, "stacked_mnist", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
