"""GANs on a 2D mixture of 8 Gaussians, without and with unrolling.

Section 3.1, Fig. 2 and Appendix A of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163). Without unrolling (K = 0) the
generator rotates through the modes; with K = 10 it spreads over all of them.

    python examples/mog.py                              Appendix A, K = 0 and K = 10
    python examples/mog.py --seeds 10                   over ten models
    python examples/mog.py --preset quick               larger rates, a seventh of the pairs
    python examples/mog.py --compare real-steps         K real steps of D instead of unrolled ones
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lab import planar, runs, seeds, study
from lab.data.mixtures import Mixture, grid, ring
from lab.figures import plots
from torch import Tensor, nn

import unroll

RECORDS = {"steps": "mog_seeds", "minibatches": "mog_resample", "real-steps": "mog_dsteps"}
MIXTURES: dict[str, dict[str, float]] = {
    "fig2": {},  # the preset's ring
    "ring": {"radius": 1.0, "deviation": 0.01},  # of PacGAN's code
    "grid": {"radius": 4.0, "deviation": 0.05},  # 5x5, of PacGAN's code
}


@dataclass(frozen=True)
class Config(study.SideBySide):
    """The settings, Appendix A's. "Ours" marks a choice where the paper is silent."""

    mixture: Literal["fig2", "ring", "grid"] = "fig2"  # fig2: the preset's; the others: PacGAN's
    unroll_steps: int = 10  # K, look-ahead steps of D in G's loss f_K; 0: the standard GAN
    stop_gradient: bool = False  # only the first term of Eq. 12 (Appendix B.2)
    average: bool = False  # G's loss is the mean of f_1..f_K (Appendix B.2)
    resample: bool = False  # a fresh minibatch for each of the K steps; the paper keeps one
    generator_steps: int = 1  # updates of G a pair
    discriminator_steps: int = 1  # real updates of D a pair
    activation: Literal["relu", "tanh"] = "relu"  # of both networks
    generator_learning_rate: float = 1e-4  # Adam's
    discriminator_learning_rate: float = 1e-4  # Adam's, in real and in look-ahead steps
    half_life: int = 0  # pairs after which both rates have halved; 0: they stay
    beta1: float = 0.5  # Adam's
    gain: float = 0.8  # of the orthogonal weights; biases start at zero (ours)
    noise_size: int = 256  # of the generator's input
    width: int = 128  # of every hidden layer, of D too (ours)
    discriminator_layers: int = 1  # hidden layers of D
    input_scale: float = 0.25  # of D
    radius: float = 2.0  # of the ring, or half the side of the grid
    deviation: float = 0.02  # of every mode
    samples: int = 2500  # behind every metric, as in VEEGAN and PacGAN
    compile: bool = True  # compile the look-ahead step and its adjoint
    evaluate_every: int = 250  # pairs
    pairs: int = 25_000  # of an update of D and one of G: 50,000 updates, as in Fig. App.1
    batch_size: int = 512  # ours

    @property
    def label(self) -> str:
        label = f"K = {self.unroll_steps}" + ", fresh" * self.resample
        return label + f", {self.discriminator_steps} D steps" * (self.discriminator_steps > 1)


PAPER = Config()
FASTER = {"generator_learning_rate": 1e-3, "discriminator_learning_rate": 1e-3}
QUICK = {**FASTER, "batch_size": 256, "pairs": 3500, "evaluate_every": 50}
# The authors' notebook, with 8 distinct modes (its linspace has the last one on the first) and with
# D updated first (it updates both at once).
NOTEBOOK = {"activation": "tanh", "gain": 1.4, "generator_learning_rate": 1e-3}
NOTEBOOK |= {"discriminator_layers": 2, "input_scale": 1.0, "radius": 1.0, "deviation": 0.01}
PRESETS = {
    "paper": PAPER,
    "quick": replace(PAPER, preset="quick", **QUICK),
    "notebook": replace(PAPER, preset="notebook", **NOTEBOOK),
}


def data(config: Config) -> Mixture:
    size = {"radius": config.radius, "deviation": config.deviation, "device": config.device}
    return grid(**size) if config.mixture == "grid" else ring(8, **size)


def train(config: Config, options: study.Options, line: int) -> None:
    rngs = seeds.generators(config)
    mixture = data(config)
    layers = partial(seeds.perceptrons, activation=config.activation, rngs=rngs, gain=config.gain)
    hidden = [config.width] * config.discriminator_layers
    g = layers([config.noise_size, config.width, config.width, 2])
    d = nn.Sequential(seeds.Scale(config.input_scale), layers([2, *hidden, 1]))
    rates = config.generator_learning_rate, config.discriminator_learning_rate
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(g.parameters(), rates[0], betas, fused=True)
    d_optimizer = torch.optim.Adam(d.parameters(), rates[1], betas, fused=True)

    def noise(count: int = config.batch_size) -> Tensor:
        return rngs.normal(count, config.noise_size).mT

    def real() -> Tensor:
        return rngs.draw(lambda rng: mixture.sample(config.batch_size, rng).T)

    game = seeds.SideBySide(unroll.Minimax(), config.seeds)
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **config.look_ahead)
    updates = config.generator_steps + config.discriminator_steps
    evaluate = planar.evaluation(g, noise(config.samples), mixture, updates=updates)
    parts = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    for pair in runs.iterate(config, options, line, parts, rngs, evaluate):
        if config.half_life:
            for optimizer, rate in zip((g_optimizer, d_optimizer), rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * 0.5 ** (pair / config.half_life)

        for _ in range(config.discriminator_steps):
            fake = g(noise()).detach()
            study.step(d_optimizer, game.discriminator_loss(d, fake, real()))

        for _ in range(config.generator_steps):
            fresh = ((g(noise()), real()) for _ in range(config.unroll_steps))
            minibatches = fresh if config.resample else None
            study.step(g_optimizer, unrolled(g(noise()), real(), minibatches=minibatches))


def report(results: study.Results) -> str:
    def name(config: Config) -> str:
        return f"mog_seeds_{config.preset}_{config.mixture}" + "_halved" * bool(config.half_life)

    first = results.first
    plots.animation(
        results.folder / "training.gif",
        {k: [moment[0] for moment in log["snapshots"]] for k, log in results.first_logs.items()},
        [f"{row['player_updates']:,} updates of G and D" for row in results.logs[0]["history"]],
        data(first).sample(first.samples, torch.Generator().manual_seed(0)),
        extent=1.4 * first.radius,
    )
    return planar.report_by(name, data, results)


@dataclass(frozen=True)
class Options(study.Options):
    """What is compared, and the runs."""

    compare: Literal["steps", "minibatches", "real-steps"] = "steps"  # each has its own record


def arms(configs: Sequence[Config], options: Options) -> list[Config]:
    configs = [replace(config, **MIXTURES[config.mixture]) for config in configs]
    if options.compare == "minibatches":
        return [replace(c, resample=fresh) for c in configs for fresh in (False, True)]
    if options.compare == "real-steps":
        standard = replace(configs[0], unroll_steps=0)
        real = [replace(standard, discriminator_steps=c.unroll_steps) for c in configs]
        return [standard, *(c for c in real if c.discriminator_steps > 1), *configs]
    return configs


def record(options: Options) -> str:
    return RECORDS[options.compare]


def rows(_: str, config: Config, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    return study.last_rows("mog", config, log)


SWEEP = {"unroll_steps": (0, 10)}
HOOKS = {"options": Options(), "arms": arms, "rows": rows}
main = partial(study.main, __doc__, PRESETS, train, report, record, SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
