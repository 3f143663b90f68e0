"""The second term of the unrolled gradient, on the mixture of 8 Gaussians.

Appendix B.2, Figs. App.3 and App.4 of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163): the whole gradient of f_K
(Eq. 12), its first term alone (stop-gradient), and the first term of the mean of f_1..f_K, with one
and with five generator steps per discriminator step. The script also measures the size of the
second term relative to the first over training.

    python examples/mog_second_gradient.py                          everything, five models each
    python examples/mog_second_gradient.py --unroll-steps 3 --generator-steps 1
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lab import planar, runs, seeds, study
from lab.data.mixtures import Mixture, ring
from torch import Tensor, nn

import unroll

CURVES = {
    "modes": "modes captured",
    "percent_outside": "samples outside the figures (%)",
    "reverse_kl_all": "reverse KL, all samples (nats)",
    "second_term": "second term / first term",
}


@dataclass(frozen=True)
class Config(study.SideBySide):
    """The settings: Appendix A's. "Ours" marks a choice where the paper is silent."""

    unroll_steps: int = 0  # K, look-ahead steps of D in G's loss
    generator_steps: int = 1  # updates of G for each of D; 5 keeps D out of equilibrium
    learning_rate: float = 1e-4  # Adam's, of both players
    samples: int = 2500  # behind every metric
    compile: bool = True  # compile the look-ahead step and its adjoint
    evaluate_every: int = 250  # pairs
    stop_gradient: bool = False  # only the first term of Eq. 12
    average: bool = False  # G's loss is the mean of f_1..f_K; the first term alone, as the paper's
    pairs: int = 25_000  # with more G steps, fewer: the same number of updates in all
    batch_size: int = 512  # ours

    @property
    def gradient(self) -> str:
        return "averaged" if self.average else "first" if self.stop_gradient else "full"

    @property
    def label(self) -> str:
        return f"{self.generator_steps}:1, {self.gradient}, K = {self.unroll_steps}"


QUICK = {"learning_rate": 2e-3, "batch_size": 128, "pairs": 1200, "evaluate_every": 30}
PRESETS = {"quick": Config("quick", **QUICK), "paper": Config()}


def data(config: Config) -> Mixture:
    return ring(8, radius=2.0, deviation=0.02, device=config.device)


def train(config: Config, options: study.Options, line: int) -> None:
    rngs = seeds.generators(config)
    mixture = data(config)
    layers = partial(seeds.perceptrons, activation="relu", rngs=rngs, gain=0.8)
    g = layers([256, 128, 128, 2])
    d = nn.Sequential(seeds.Scale(0.25), *layers([2, 128, 1]))
    g_optimizer = torch.optim.Adam(g.parameters(), config.learning_rate, (0.5, 0.999))
    d_optimizer = torch.optim.Adam(d.parameters(), config.learning_rate, (0.5, 0.999))

    def noise(count: int = config.batch_size) -> Tensor:
        return rngs.normal(count, 256).mT.contiguous()

    def real(rngs: seeds.Generators = rngs) -> Tensor:
        return rngs.draw(lambda rng: mixture.sample(config.batch_size, rng).T)

    game = seeds.SideBySide(unroll.Minimax(), config.seeds)
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **config.look_ahead)
    both = replace(config, stop_gradient=False, average=False).look_ahead
    whole = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **both)
    held_out = noise(config.samples)
    a_batch = held_out[..., : config.batch_size], real(seeds.generators(config))
    updates = 1 + config.generator_steps
    look = planar.evaluation(g, held_out, mixture, updates=updates, window=planar.WINDOW)

    def evaluate(pairs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        row, snapshot = look(pairs, earlier)
        z, images = a_batch
        terms = unroll.gradient_terms(whole, g(z), images, g.parameters())
        first, second = map(norms, terms)
        for each, ratio in zip(row["each"], (second / first).tolist(), strict=True):
            each["second_term"] = ratio
        return row, snapshot

    parts = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    for _ in runs.iterate(config, options, line, parts, rngs, evaluate):
        fake = g(noise()).detach()
        study.step(d_optimizer, game.discriminator_loss(d, fake, real()))
        for _ in range(config.generator_steps):
            study.step(g_optimizer, unrolled(g(noise()), real()))


def norms(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of every seed's gradient in all parameters."""
    return torch.cat([gradient.flatten(1) for gradient in gradients], 1).norm(dim=1)


def report(results: study.Results) -> str:
    def name(config: Config) -> str:
        return f"mog_second_gradient_{config.generator_steps}_{config.gradient}"

    how = {"curves": CURVES, "table": (*planar.TABLE, "second_term")}
    return planar.report_by(name, data, results, **how)


def arms(configs: Sequence[Config], _: study.Options) -> list[Config]:
    def as_many(pairs: int, steps: int) -> int:
        return max(2 * pairs // (1 + steps), 1)

    return [
        replace(
            config,
            pairs=as_many(config.pairs, config.generator_steps),
            evaluate_every=as_many(config.evaluate_every, config.generator_steps),
            average=config.average and config.stop_gradient,
        )
        for config in configs
    ]


SWEEP = {"stop_gradient": (False, True), "average": (False, True)}
SWEEP |= {"unroll_steps": (1, 3, 5, 10, 20), "generator_steps": (1, 5)}
ROWS = partial(planar.late_rows, also=["second_term"])
HOOKS = {"options": study.Options(seeds=5), "arms": arms, "rows": ROWS}
main = partial(study.main, __doc__, PRESETS, train, report, "mog_second_gradient", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
