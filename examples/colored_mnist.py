"""Coloured MNIST: how much of a continuous distribution of colours the generator covers.

Section 3.3.2, Table 2 and Appendix F of Metz et al., "Unrolled Generative Adversarial Networks"
(https://arxiv.org/abs/1611.02163): each digit has one colour, normal with deviation 0.5. k-means
finds the colour of a generated digit. The metric is the JS divergence between Gaussian kernel
densities of the colours of data and of samples. The paper: 5 to 10 steps are best, 1 step seems to
hurt, and larger models do better.

Seeds are trained side by side. Each model and its random draws are the same as when trained alone.

    python examples/colored_mnist.py                    12 cells at a small scale
    python examples/colored_mnist.py --preset paper     Appendix F (for a GPU)
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
from lab import runs, seeds, study
from lab.columns import moments
from lab.data import colors, digits
from lab.data.pixels import as_bytes
from lab.figures import images
from lab.figures.plots import save
from lab.networks import dcgan, joined
from lab.trace import Trace
from torch import Tensor, nn

import unroll


@dataclass(frozen=True)
class Config(study.SideBySide):
    """One run: Appendices D and F. "Ours" marks a choice where they are silent."""

    size: Literal["1/4", "1/2", "1"] = "1"  # X, of both networks; at 1 they are Appendix D's
    base: Literal["1/4", "1/2", "1"] = "1"  # the part of the paper's widths that X is a part of
    unroll_steps: int = 0  # K, look-ahead steps of D in G's loss
    generator_learning_rate: float = 1e-4  # Adam's
    discriminator_learning_rate: float = 2e-4  # Adam's
    beta1: float = 0.5  # that of Appendices A and C
    noise_size: int = 256  # of the generator's input
    compile: bool = True  # compile the look-ahead step and its adjoint
    samples: int = 10_000  # behind every metric, and as many digits of the data (ours)
    evaluate_every: int = 2500  # pairs
    pairs: int = 50_000  # of updates, D first (ours): the 100,000 updates of Appendix D
    batch_size: int = 128  # PacGAN's

    def __post_init__(self) -> None:
        """Refuse too few samples: a density of colours needs at least ten."""
        if self.samples < 10:
            raise ValueError(f"--samples must be at least 10, got {self.samples}")
        super().__post_init__()

    @property
    def label(self) -> str:
        return f"X = {self.size}, K = {self.unroll_steps}"


PAPER = Config()
RATES = {"generator_learning_rate": 2e-3, "discriminator_learning_rate": 2e-3}
SMALL = {"samples": 1000, "evaluate_every": 250, "pairs": 1500, "batch_size": 16}
PRESETS = {"small": replace(PAPER, preset="small", base="1/4", **RATES, **SMALL), "paper": PAPER}
Options = study.DataOptions


def networks(config: Config, rng: torch.Generator) -> tuple[nn.Sequential, nn.Sequential]:
    """Return G and D."""
    width = float(Fraction(config.size) * Fraction(config.base))
    generator = dcgan.generator(width, rng, noise_size=config.noise_size)
    return generator, dcgan.discriminator(width, rng)


def batch(data: digits.Digits, count: int, rng: torch.Generator) -> Tensor:
    return colors.coloured(data.sample(count, rng), colors.draw(count, rng), rng)


def train(config: Config, options: Options, line: int) -> None:
    rngs = seeds.generators(config)
    data = digits.mnist(options.data_root, size=32).to(config.device)
    g, d = joined.players(rngs, partial(networks, config))
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(g.parameters(), config.generator_learning_rate, betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.discriminator_learning_rate, betas)
    numbers = range(config.seeds)
    losses = [f"{player}_loss{number}" for player in "dg" for number in numbers]
    trace = Trace(*losses, "data_seconds", "seconds")

    def noise(count: int = config.batch_size) -> Tensor:
        return rngs.normal(count, config.noise_size)

    def real() -> Tensor:
        return joined.last(rngs.draw(partial(batch, data, config.batch_size)))

    held_out = noise(config.samples)

    def references(rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Return colours of data, and reference values of the metrics."""
        of_data, again = (colors.foreground(batch(data, config.samples, rng)) for _ in range(2))
        single = of_data.mean(0).expand(config.samples, 3)
        return of_data, {
            "js_floor": colors.js_divergence(of_data, again),
            "js_single_colour": colors.js_divergence(of_data, single),
            "discarded_data": 1 - len(of_data) / config.samples,
        }

    known = rngs.each(references)

    @torch.no_grad()
    def evaluate(pairs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        start, each = earlier[-1]["pairs"] if earlier else 0, []
        g.eval()
        for number, (of_data, compared) in enumerate(known):
            parts = held_out[number].split(colors.CHUNK)
            found = torch.cat([colors.foreground(g[number](z)) for z in parts])
            spread = found.var(0).sum() if len(found) > 1 else torch.zeros(())
            row = {
                "js_divergence": colors.js_divergence(of_data, found),
                "discarded": 1 - len(found) / config.samples,
                "colour_variance": (spread / of_data.var(0).sum()).item(),
                "d_loss": trace.mean(f"d_loss{number}", start),
                "g_loss": trace.mean(f"g_loss{number}", start),
                "seconds_a_pair": trace.median("seconds") / config.seeds,
                "data_seconds_a_pair": trace.median("data_seconds") / config.seeds,
            }
            each.append(row | compared)
        shown = g[0](held_out[0, :16])
        g.train()
        return {"player_updates": 2 * pairs, "each": each}, as_bytes(shown).cpu()

    game = seeds.SideBySide(unroll.NonSaturating(), config.seeds)
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **config.look_ahead)
    parts = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer, "trace": trace}
    for _ in runs.iterate(config, options, line, parts, rngs, evaluate):
        began = time.process_time()
        d_images = real()
        g_images = real() if config.unroll_steps else d_images  # f_0 uses none
        data_seconds = time.process_time() - began
        d_losses = game.discriminator_losses(d, g(noise()).detach(), d_images)
        study.step(d_optimizer, d_losses.sum())

        fake = g(noise())
        g_losses = game.generator_losses(unrolled.unroll(fake, g_images), fake)
        study.step(g_optimizer, g_losses.sum())
        seconds = time.process_time() - began
        values = dict(zip(losses, [*d_losses, *g_losses], strict=True))
        trace.add(**values, data_seconds=data_seconds, seconds=seconds)


def rows(record: str, config: Config, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        row | {"images_a_second": config.batch_size / row["seconds_a_pair"]}
        for row in study.model_rows(record, config, log)
        if row["pairs"] == config.pairs
    ]


def report(results: study.Results) -> str:
    curves = {"js_divergence": "JS (nats)", "colour_variance": "variance of colours / data's"}
    table = "js_divergence", "js_floor", "js_single_colour", "colour_variance", "discarded"
    images.report("colored_mnist_samples", results, curves=curves, table=table)

    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    last = results.last.groupby("setting")
    steps = sorted({config.unroll_steps for config in results.configs})
    for number, size in enumerate(dict.fromkeys(config.size for config in results.configs)):
        js = [last.get_group(f"X = {size}, K = {k}")["js_divergence"] for k in steps]
        x, color = [place + 0.1 * number for place in range(len(steps))], f"C{number}"
        means, errors = zip(*map(moments, js), strict=True)
        ax.errorbar(x, means, errors, fmt="o", color=color, label=f"X = {size}")
        for place, values in zip(x, js, strict=True):
            ax.plot([place] * len(values), values, ".", color=color, alpha=0.35)
    floor = results.last["js_floor"].mean()
    ax.axhline(floor, color="0.6", linestyle="--", linewidth=1, label="data against data")
    ax.set_xticks(range(len(steps)), [str(k) for k in steps])
    ax.set(xlabel="look-ahead steps K", ylabel="JS divergence of colours, nats", ylim=(0, None))
    ax.legend()
    save(figure, results.folder / "colored_mnist_js.png")
    return results.sentence("js_divergence", "is {} nats from the data's colours")


def arms(configs: Sequence[Config], options: Options) -> list[Config]:
    digits.mnist(options.data_root)
    return list(configs)


SWEEP = {"size": ("1/4", "1/2", "1"), "unroll_steps": (0, 1, 5, 10)}
HOOKS = {"options": Options(), "arms": arms, "rows": rows}
main = partial(study.main, __doc__, PRESETS, train, report, "colored_mnist", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
