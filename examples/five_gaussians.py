"""Five Gaussians on a circle: JS-GAN against RpGAN in wide and narrow networks, and unrolled.

The second toy of Sun, Fang and Schwing, "Towards a Better Global Loss Landscape of GANs" (NeurIPS
2020, https://arxiv.org/abs/2011.04926). They find that pairing real with fake samples (RpGAN, their
RS-GAN) does better than the original JS-GAN with relatively narrow networks. Their code trains on
10,000 fixed points and keeps the last layer of D at unit norm for RpGAN only. Here the points are
drawn anew, and `--normalise` applies to all games, in real and in look-ahead steps.

    python examples/five_gaussians.py                            JS and Rp, K = 0 and 5, narrow
    python examples/five_gaussians.py --preset paper --width 16 128 --unroll-steps 0
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from lab import planar, runs, seeds, study
from lab.data.mixtures import Mixture, ring
from torch import Tensor
from torch.nn.functional import normalize

import unroll

GAMES: dict[str, unroll.Objective] = {
    "JS": unroll.NonSaturating(),  # as in the authors' code
    "Rp": unroll.RelativisticPairing(),
}
LAST = "4.weight"  # of D


@dataclass(frozen=True)
class Config(study.SideBySide):
    """The settings: those of the authors' code."""

    game: Literal["JS", "Rp"] = "JS"  # JS: the original GAN; Rp: their RS-GAN
    unroll_steps: int = 0  # K, look-ahead steps of D in G's loss
    stop_gradient: bool = False  # only the first term of Eq. 12
    normalise: bool = False  # keep D's last layer at unit norm
    width: int = 128  # of the hidden layers of both networks
    generator_learning_rate: float = 1e-4  # Adam's
    discriminator_learning_rate: float = 1e-4  # Adam's
    beta1: float = 0.0  # Adam's
    beta2: float = 0.9  # Adam's
    noise_size: int = 2  # of the generator's input
    samples: int = 2500  # behind every metric
    compile: bool = True  # compile the look-ahead step and its adjoint
    evaluate_every: int = 250  # pairs
    pairs: int = 20_000  # of an update of D and one of G
    batch_size: int = 128

    @property
    def label(self) -> str:
        normalised = ", normalised" * self.normalise
        return f"{self.game}, K = {self.unroll_steps}, width {self.width}{normalised}"


PAPER = Config()
FASTER = {"generator_learning_rate": 1e-3, "discriminator_learning_rate": 1e-3}
QUICK = {**FASTER, "width": 16, "pairs": 2000, "evaluate_every": 50}
PRESETS = {"quick": replace(PAPER, preset="quick", **QUICK), "paper": PAPER}


def normalised(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return D's parameters with the rows of the last layer at unit norm."""
    return {**parameters, LAST: normalize(parameters[LAST], dim=-1)}


def data(config: Config) -> Mixture:
    return ring(5, radius=1.0, deviation=math.sqrt(0.002), device=config.device)


def train(config: Config, options: study.Options, line: int) -> None:
    rngs = seeds.generators(config)
    mixture, hidden = data(config), [config.width, config.width]
    g = seeds.perceptrons([config.noise_size, *hidden, 2], "relu", rngs)
    d = seeds.perceptrons([2, *hidden, 1], "leaky_relu", rngs, last_bias=False)
    betas = config.beta1, config.beta2
    g_optimizer = torch.optim.Adam(g.parameters(), config.generator_learning_rate, betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.discriminator_learning_rate, betas)

    def noise(count: int = config.batch_size) -> Tensor:
        return rngs.normal(config.noise_size, count)

    game = seeds.SideBySide(GAMES[config.game], config.seeds)
    how = {"project": normalised if config.normalise else None, **config.look_ahead}
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **how)
    evaluate = planar.evaluation(g, noise(config.samples), mixture)
    parts = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    for _ in runs.iterate(config, options, line, parts, rngs, evaluate):
        real, z = rngs.draw(lambda rng: mixture.sample(config.batch_size, rng).T), noise()
        d_loss = game.discriminator_loss(d, g(z).detach(), real)
        study.step(d_optimizer, d_loss)
        if config.normalise:
            d.load_state_dict(normalised(d.state_dict()))
        study.step(g_optimizer, unrolled(g(z), real))  # the same batch, as the authors


def report(results: study.Results) -> str:
    def name(config: Config) -> str:
        return f"five_gaussians_{config.width}" + "_normalised" * config.normalise

    return planar.report_by(name, data, results)


SWEEP = {"width": None, "unroll_steps": (0, 5), "game": ("JS", "Rp")}
HOOKS = {"options": study.Options(seeds=10)}
main = partial(study.main, __doc__, PRESETS, train, report, "five_gaussians", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
