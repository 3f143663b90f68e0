"""Eight Gaussians of unequal weights, with both terms of the unrolled gradient and with the first.

The setting of the README of https://github.com/andrewliao11/unrolled-gans. It makes the mixture of
Metz et al. (https://arxiv.org/abs/1611.02163) harder by random weights. It finds that unrolling
helps slightly at a standard deviation of the weights of 0.06, fails at 0.12 (both with tanh) and
helps more with ReLU. Its code detaches the fakes in the look-ahead, so it follows only the first
term of the paper's Eq. 12. Here that is `--stop-gradient True`; False gives both terms.

    python examples/mog_nonuniform.py                    ReLU, all three weights, narrow networks
    python examples/mog_nonuniform.py --preset readme    its networks, batches and length
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from lab import planar, runs, seeds, study
from lab.data.mixtures import Mixture, ring
from torch import Tensor

import unroll

# Seeds of the weights: the first whose standard deviation is within 0.0005 of the README's.
WEIGHTS = {0.0: None, 0.06: 44, 0.12: 3}


@dataclass(frozen=True)
class Config(study.SideBySide):
    """The settings: those of the README's code."""

    weight_deviation: float = 0.06  # the standard deviation of the weights: 0, 0.06 or 0.12
    activation: Literal["relu", "tanh"] = "relu"  # of the generator; D has ReLU
    unroll_steps: int = 10  # K, look-ahead steps of D in G's loss
    stop_gradient: bool = False  # only the first term of Eq. 12; at K = 0 there is no other
    generator_learning_rate: float = 1e-3  # Adam's
    discriminator_learning_rate: float = 1e-4  # Adam's
    beta1: float = 0.5  # Adam's
    noise_size: int = 256  # of the generator's input
    width: int = 128  # of two hidden layers in either network
    radius: float = 2.0  # of the ring
    deviation: float = 0.02  # of every mode
    samples: int = 2500  # behind every metric
    compile: bool = True  # compile the look-ahead step and its adjoint
    evaluate_every: int = 900  # pairs
    pairs: int = 27_000  # as far as its figures go; its code stops at 3,000
    batch_size: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_deviation not in WEIGHTS:
            known = ", ".join(map(str, WEIGHTS))
            raise ValueError(f"--weight-deviation must be {known}, got {self.weight_deviation}")

    @property
    def label(self) -> str:
        term = ", first term" * self.stop_gradient
        return f"{self.activation} {self.weight_deviation}, K = {self.unroll_steps}{term}"


README = Config("readme")
QUICK = {"generator_learning_rate": 3e-3, "discriminator_learning_rate": 3e-4, "pairs": 1000}
QUICK |= {"noise_size": 64, "width": 32, "batch_size": 64, "evaluate_every": 25}
PRESETS = {"quick": replace(README, preset="quick", **QUICK), "readme": README}


def weights(deviation: float) -> list[float]:
    """Return the modes' probabilities: uniform draws, normalised, of a given deviation."""
    seed = WEIGHTS[deviation]
    if seed is None:
        return [1 / 8] * 8
    drawn = torch.rand(8, generator=torch.Generator().manual_seed(seed))
    shares: list[float] = (drawn / drawn.sum()).tolist()
    return shares


def data(config: Config) -> Mixture:
    size = {"radius": config.radius, "deviation": config.deviation, "device": config.device}
    return ring(8, **size, weights=weights(config.weight_deviation))


def train(config: Config, options: study.Options, line: int) -> None:
    rngs = seeds.generators(config)
    mixture, hidden = data(config), [config.width, config.width]
    g = seeds.perceptrons([config.noise_size, *hidden, 2], config.activation, rngs)
    d = seeds.perceptrons([2, *hidden, 1], "relu", rngs)
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(g.parameters(), config.generator_learning_rate, betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.discriminator_learning_rate, betas)

    def noise(count: int = config.batch_size) -> Tensor:
        return rngs.normal(config.noise_size, count)

    def real() -> Tensor:
        return rngs.draw(lambda rng: mixture.sample(config.batch_size, rng).T)

    game = seeds.SideBySide(unroll.NonSaturating(), config.seeds)
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **config.look_ahead)
    evaluate = planar.evaluation(g, noise(config.samples), mixture)
    parts = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    for _ in runs.iterate(config, options, line, parts, rngs, evaluate):
        fake = g(noise()).detach()
        study.step(d_optimizer, game.discriminator_loss(d, fake, real()))
        study.step(g_optimizer, unrolled(g(noise()), real()))


def report(results: study.Results) -> str:
    def name(config: Config) -> str:
        return f"mog_nonuniform_{config.activation}_{config.weight_deviation}"

    return planar.report_by(name, data, results)


def arms(configs: Sequence[Config], _: study.Options) -> list[Config]:
    return [replace(c, stop_gradient=c.stop_gradient and c.unroll_steps > 0) for c in configs]


SWEEP = {"activation": ("relu",), "weight_deviation": tuple(WEIGHTS)}
SWEEP |= {"unroll_steps": (0, 10), "stop_gradient": (False, True)}
HOOKS = {"options": study.Options(seeds=10), "arms": arms}
main = partial(study.main, __doc__, PRESETS, train, report, "mog_nonuniform", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
