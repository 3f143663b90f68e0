"""A generator against past discriminators, on the mixture of 8 Gaussians.

Appendix B.1, Figs. App.1 and App.2 of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163): G's loss is the mean over an
ensemble of N past discriminators, either the last N or N that are `delay` updates apart. Does
looking back do what looking ahead does? The paper: no, and longer delays make the game less stable.

    python examples/mog_history.py                              both figures, three models each
    python examples/mog_history.py --members 1 5 --delay 100    some of their rows
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from lab import planar, runs, seeds, study
from lab.data.mixtures import Mixture, ring
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

import unroll

DELAYED = 5  # members of the ensembles with a delay, Fig. App.2


@dataclass(frozen=True)
class Config(study.SideBySide):
    """The settings: Appendix A's. "Ours" marks a choice where the paper is silent."""

    unroll_steps: int = 0
    generator_steps: int = 1
    learning_rate: float = 1e-4  # Adam's, of both players
    samples: int = 2500  # behind every metric
    compile: bool = True  # compile the look-ahead step and its adjoint
    evaluate_every: int = 250  # pairs
    members: int = 1  # N; 1 is the standard GAN
    delay: int = 1
    live: bool = True
    pairs: int = 25_000  # of an update of D and one of G
    batch_size: int = 512  # ours

    @property
    def label(self) -> str:
        if self.unroll_steps:
            return f"K = {self.unroll_steps}"
        if self.delay == 1:
            return f"N = {self.members}"
        return f"delay {self.delay}" + ", sampled" * (not self.live)


QUICK = {"learning_rate": 1e-3, "batch_size": 256, "pairs": 3500, "evaluate_every": 50}
PRESETS = {"quick": Config("quick", **QUICK), "paper": Config()}


class Ensemble(nn.Module):
    """Past discriminators, side by side as additional independent networks."""

    def __init__(
        self, discriminator: nn.Module, *, members: int, delay: int, live: bool = True
    ) -> None:
        super().__init__()
        self.discriminator = [discriminator]  # in a list: it is no part of the state
        self.size, self.delay, self.live = members, delay, live
        self.names = [name for name, _ in discriminator.named_parameters()]
        for name, parameter in discriminator.named_parameters():
            past = parameter.detach().new_zeros(members, *parameter.shape)
            self.register_buffer(name.replace(".", "_"), past)
        self.register_buffer("updates", torch.tensor(0))

    @torch.no_grad()
    def follow(self) -> None:
        """Sample D after one of its updates."""
        updates = int(self.updates)
        if self.live or updates % self.delay == 0:
            place = updates // self.delay % self.size
            for name, parameter in self.discriminator[0].named_parameters():
                self.get_buffer(name.replace(".", "_"))[place] = parameter
        self.updates += 1

    def __len__(self) -> int:
        return min(-(-int(self.updates) // self.delay), self.size)

    def forward(self, x: Tensor) -> Tensor:
        """Return all members' logits of every seed's samples, `(members * seeds, 1, samples)`."""
        past = {n: self.get_buffer(n.replace(".", "_"))[: len(self)] for n in self.names}
        side_by_side = {name: stack.flatten(0, 1) for name, stack in past.items()}
        return functional_call(self.discriminator[0], side_by_side, x.repeat(len(self), 1, 1))


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
    ensemble = Ensemble(d, members=config.members, delay=config.delay, live=config.live)

    def noise(count: int = config.batch_size) -> Tensor:
        return rngs.normal(count, 256).mT.contiguous()

    def real() -> Tensor:
        return rngs.draw(lambda rng: mixture.sample(config.batch_size, rng).T)

    game = seeds.SideBySide(unroll.Minimax(), config.seeds)
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **config.look_ahead)
    evaluate = planar.evaluation(g, noise(config.samples), mixture, window=planar.WINDOW)
    parts = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    parts |= {"ensemble": ensemble}
    for _ in runs.iterate(config, options, line, parts, rngs, evaluate):
        fake = g(noise()).detach()
        study.step(d_optimizer, game.discriminator_loss(d, fake, real()))
        ensemble.follow()

        fake, images = g(noise()), real()
        if config.unroll_steps:
            study.step(g_optimizer, unrolled(fake, images))
        else:  # f, without its real-data term, which is constant in theta_G here
            study.step(g_optimizer, -config.seeds * softplus(ensemble(fake)).mean())


def report(results: study.Results) -> str:
    figures: dict[str, Callable[[Config], bool]] = {
        "ensembles": lambda config: config.delay == 1,
        "delays": lambda config: config.members == DELAYED and config.live,
        "sampled": lambda config: config.members == DELAYED and not config.live,
    }
    table = (*planar.TABLE, "percent_outside")
    for name, shown in figures.items():
        if any(map(shown, results.configs)):
            own = results.only(shown)
            planar.report(f"mog_history_{name}", own, data(own.first), table=table)
    return results.sentence("modes", "holds {} of 8 modes")


@dataclass(frozen=True)
class Options(study.Options):
    """The ensembles, and the runs."""

    seeds: int = 3  # models of each setting
    delay: tuple[int, ...] = (10, 100, 500)  # updates of D between members, of 5: Fig. App.2
    unroll_steps: tuple[int, ...] = (10,)  # K, look-ahead steps of D in G's loss, of no ensemble


def arms(configs: Sequence[Config], options: Options) -> list[Config]:
    first = configs[0]
    delayed = [
        replace(first, members=DELAYED, delay=delay, live=live)
        for live in (True, False)  # whether the newest is D as it is, or as last sampled (ours)
        for delay in options.delay
    ]
    ahead = [replace(first, members=1, unroll_steps=k) for k in options.unroll_steps]
    return [*configs, *delayed, *ahead]


SWEEP = {"members": (1, 5, 20, 50)}
HOOKS = {"options": Options(), "arms": arms, "rows": planar.late_rows}
main = partial(study.main, __doc__, PRESETS, train, report, "mog_history", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
