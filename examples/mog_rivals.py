"""Rival methods with and without unrolling, on a ring and a grid of Gaussians.

All methods share the networks, the learning rate, the batch size and the number of generator
updates. The rest of each method follows its own paper or code:

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

The optimizer is otherwise Adam with betas (0.5, 0.999). With K > 0 the method's generator loss is
evaluated at D after K look-ahead steps, which minimise D's loss with the method's penalties.

    python examples/mog_rivals.py                       all methods, K = 0 and 5, 1,500 updates of G
    python examples/mog_rivals.py --method GAN PacGAN2 --mixture ring
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
from lab import planar, runs, seeds, study
from lab.columns import moments
from lab.data.mixtures import Mixture, grid, ring
from lab.figures import plots
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
class Config(study.SideBySide):
    """The settings: Appendix A of the unrolled paper, with two hidden layers in D as in G."""

    data: Literal["ring", "grid"] = "ring"  # the paper's ring, or the grid of VEEGAN and PacGAN
    method: Literal[tuple(METHODS)] = "GAN"  # see above
    unroll_steps: int = 0  # K, look-ahead steps of D in G's loss; 0 is the method alone
    learning_rate: float = 1e-4  # Adam's, of both players
    noise_size: int = 256  # of the generator's input
    width: int = 128  # of two hidden ReLU layers in either network
    input_scale: float = 0.25  # of D
    samples: int = 2500  # behind every metric
    evaluate_every: int = 500  # updates of G
    pairs: int = 25_000  # updates of G
    batch_size: int = 512

    @property
    def label(self) -> str:
        return f"{self.data}, {self.method}, K = {self.unroll_steps}"


FULL = Config("full")
QUICK = {"learning_rate": 1e-3, "noise_size": 64, "width": 64, "batch_size": 128}
QUICK |= {"pairs": 1500, "evaluate_every": 100}
PRESETS = {"quick": replace(FULL, preset="quick", **QUICK), "full": FULL}


def mixture_of(config: Config) -> Mixture:
    """Return the data."""
    if config.data == "grid":
        return grid(radius=4.0, deviation=0.05, device=config.device)
    return ring(radius=2.0, deviation=0.02, device=config.device)


class Discriminators(nn.Module):
    """The D of every seed, on a plain batch: the first seed's samples first."""

    def __init__(self, config: Config, packing: int, rngs: seeds.Generators) -> None:
        super().__init__()
        self.shape = config.seeds, -1, 2 * packing
        sizes = [2 * packing, config.width, config.width, 1]
        layers = seeds.perceptrons(sizes, "relu", rngs)
        self.layers = nn.Sequential(seeds.Scale(config.input_scale), layers)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x.reshape(self.shape).mT)
        return logits.flatten()


def train(config: Config, options: study.Options, line: int) -> None:
    method = METHODS[config.method]
    rngs = seeds.generators(config)
    mixture, width = mixture_of(config), config.width
    g = seeds.perceptrons([config.noise_size, width, width, 2], "relu", rngs)
    d = Discriminators(config, method.packing, rngs)
    g_optimizer = torch.optim.Adam(g.parameters(), config.learning_rate, method.betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.learning_rate, method.betas)
    batch_size = config.batch_size * method.packing

    def batches() -> Iterator[Tensor]:
        """Return generated samples and data, the first seed's first."""
        fake = g(rngs.normal(config.noise_size, batch_size))
        real = rngs.draw(lambda rng: mixture.sample(batch_size, rng).T)
        return (x.mT.flatten(0, 1) for x in (fake, real))

    updates = 1 + method.discriminator_steps
    held_out = rngs.normal(config.noise_size, config.samples)
    evaluate = planar.evaluation(g, held_out, mixture, updates=updates)
    game = seeds.SideBySide(method.game, config.seeds)
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **config.look_ahead)
    parts = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    for iteration in runs.iterate(config, options, line, parts, rngs, evaluate):
        torch.manual_seed(iteration)  # GradientPenalty's points: the same in a resumed run
        for _ in range(method.discriminator_steps):
            fake, real = batches()
            study.step(d_optimizer, game.discriminator_loss(d, fake.detach(), real))

        if method.gradient_norm:
            g_loss = regularised(unrolled, *batches(), method.gradient_norm)
        else:
            g_loss = unrolled(*batches())
        study.step(g_optimizer, g_loss)


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


def report(results: study.Results) -> str:
    results.table(*planar.TABLE, "seconds")
    first = results.first
    last = results.last.groupby("setting")
    data = list(dict.fromkeys(config.data for config in results.configs))
    figure, axes = plt.subplots(
        1, len(data), figsize=(4 * len(data) + 1, 3.5), squeeze=False, layout="constrained"
    )
    for ax, name in zip(axes[0], data, strict=True):
        samples: dict[str, list[Tensor]] = {}
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for config, log in zip(results.configs, results.logs, strict=True):
            if config.data == name:
                own = last.get_group(config.label)
                point = own["seconds"].iloc[0], *moments(own["modes"])
                lines.setdefault(config.method, []).append(point)
                shown = samples.setdefault(f"K = {config.unroll_steps}", [])
                shown.append(log["snapshots"][-1][0])
        for method, line in lines.items():
            x, means, errors = zip(*line, strict=True)  # the first is without looking ahead
            ax.errorbar(x, means, errors, marker="o", linewidth=1, label=method)
            ax.plot(x[:1], means[:1], "wo", markersize=3.5, zorder=3)
        # Seconds are rounded: those of a very short run may be 0, which a logarithm has not.
        scale = "log" if all(x > 0 for line in lines.values() for x, *_ in line) else "linear"
        ax.set(title=f"the {name}", xscale=scale, xlabel=f"seconds of {first.seeds} seeds")
        mixture = mixture_of(replace(first, data=name))
        plots.heat_maps(
            results.folder / f"mog_rivals_{name}.png",
            samples,
            [method.replace(" ", "\n") for method in lines],
            mixture.sample(first.samples, torch.Generator().manual_seed(first.first_seed)),
            extent=1.25 * mixture.means.abs().max().item(),
            caption=f"after {first.pairs:,} updates of G (preset {first.preset}, "
            f"seed {first.first_seed})",
        )
    axes[0, 0].set_ylabel("modes covered")
    axes[0, -1].legend()
    plots.save(figure, results.folder / "mog_rivals_costs.png")
    return results.sentence("modes", "covers {} modes")


def rows(record: str, config: Config, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    last = study.last_rows(record, config, log)
    return [row | {"cpu_seconds": row["seconds"]} for row in last]  # its older name, too


SWEEP = {"data": ("ring", "grid"), "method": tuple(METHODS), "unroll_steps": (0, 5)}
HOOKS = {"options": study.Options(seeds=10), "rows": rows}
main = partial(study.main, __doc__, PRESETS, train, report, "mog_rivals", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
