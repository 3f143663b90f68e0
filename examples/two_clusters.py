"""Two clusters on a line: the bad basin of the original GAN, with and without unrolling.

Sun, Fang and Schwing, "Towards a Better Global Loss Landscape of GANs" (NeurIPS 2020,
https://arxiv.org/abs/2011.04926), prove that the empirical loss of separable GANs, the original
JS-GAN among them, has a basin at every collapsed state, and that of RpGAN (their RS-GAN) has none.
Here are 100 points in two clusters, 100 fixed noises, and tiny networks. While all fakes sit on one
cluster the best D of a JS-GAN has the loss 0.4774; when they match the data, 0.6931.

Does looking ahead remove the basin? `--start collapsed` begins in it: all fakes on the first
cluster, and D at its best against them.

    python examples/two_clusters.py                   JS and Rp, K = 0 and 5, twenty models each
    python examples/two_clusters.py --preset paper    the authors' code, all of its 5,000 epochs
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from lab import runs, seeds, study
from lab.figures.plots import save
from matplotlib.axes import Axes
from torch import Tensor, nn

import unroll

SAMPLES = 100
CENTRES = (0.0, 4.0)
SPREAD = 0.3  # each cluster is uniform on [centre, centre + SPREAD]
NEAR = 1.2 * SPREAD  # from a centre: the authors' count of samples in a cluster
AROUND = 1.0  # from the middle of a cluster: a quarter of the way to the other
COVERED = SAMPLES // 4  # around a cluster: half of its share
COLLAPSED = 9 * SAMPLES // 10  # around one cluster, with none around the other
PLATEAU = dict.fromkeys(("JS", "minimax"), math.log(3) / 4 + math.log(3 / 2) / 2)
PLATEAU["Rp"] = math.log(2) / 2
MATCHED = math.log(2)
ALONE = 3000  # steps of D at the collapsed start


class HalfMinimax(unroll.Minimax):
    """The minimax game, with D's loss the mean of its two terms as in the authors' code."""

    def discriminator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        return super().discriminator_loss(discriminator, fake, real) / 2


GAMES: dict[str, unroll.Objective] = {
    "JS": unroll.Criterion(nn.BCEWithLogitsLoss(), weight=0.5),
    "Rp": unroll.RelativisticPairing(),
    "minimax": HalfMinimax(),
}


@dataclass(frozen=True)
class Config(study.SideBySide):
    """The settings: those of the authors' code."""

    grows: ClassVar[str] = "epochs"
    game: Literal["JS", "Rp", "minimax"] = "JS"  # minimax: JS with the loss that theorems are about
    unroll_steps: int = 0  # K, look-ahead steps of D in G's loss
    stop_gradient: bool = False  # only the first term of Eq. 12
    start: Literal["random", "collapsed"] = "random"  # collapsed: in the basin, D trained alone
    generator_learning_rate: float = 1e-2  # SGD's
    discriminator_learning_rate: float = 1e-2  # SGD's
    momentum: float = 0.9  # SGD's, of both players
    generator_steps: int = 10  # an epoch
    discriminator_steps: int = 10  # an epoch
    generator_width: int = 5  # of two hidden layers, tanh
    discriminator_width: int = 10  # of two hidden layers, sigmoid
    compile: bool = True  # compile the look-ahead step and its adjoint
    evaluate_every: int = 10  # epochs
    epochs: int = 5000  # of 10 D and 10 G steps

    @property
    def label(self) -> str:
        collapsed = ", collapsed" * (self.start == "collapsed")
        return f"{self.game}-GAN, K = {self.unroll_steps}{collapsed}"


PAPER = Config()
FASTER = {"generator_learning_rate": 0.05, "discriminator_learning_rate": 0.05, "epochs": 1000}
PRESETS = {
    "quick": replace(PAPER, preset="quick", **FASTER),
    "paper": PAPER,
    "narrow": replace(PAPER, preset="narrow", generator_width=3, discriminator_width=5),
}


def clusters(rng: torch.Generator) -> Tensor:
    """Return the data: points of the two clusters alternating, in one row."""
    centres = torch.tensor(CENTRES, device=rng.device).repeat(SAMPLES // 2)
    offsets = torch.rand(SAMPLES, generator=rng, device=rng.device)
    return (centres + SPREAD * offsets)[None]


def noises(rng: torch.Generator) -> Tensor:
    """Return the generator's inputs, uniform on [-5, 5], in one row."""
    return 10 * torch.rand(1, SAMPLES, generator=rng, device=rng.device) - 5


def counts(fake: Tensor) -> dict[str, int]:
    """Count the samples near each centre, as the authors do, and in a wider window around it."""
    found = {}
    for name, centre in zip(("first", "second"), CENTRES, strict=True):
        found[f"near_{name}"] = int(((fake - centre).abs() < NEAR).sum())
        found[f"around_{name}"] = int(((fake - centre - SPREAD / 2).abs() < AROUND).sum())
    return found


def landmarks(
    epochs: int, row: Mapping[str, float], earlier: Sequence[Mapping[str, Any]], game: str
) -> dict[str, int]:
    """Follow one seed through the landscape.

    Returns:
        covers: Whether both clusters have half of their share of the samples around them.
        covered_at: The epoch of the first evaluation that did; -1 before.
        collapsed: Evaluations so far with 90 of 100 samples around one cluster and none around
            the other.
        on_plateau: Collapsed evaluations with D's loss within 0.02 of the collapsed optimum.
    """
    few, many = sorted((row["around_first"], row["around_second"]))
    covers = few >= COVERED
    collapsed = many >= COLLAPSED and few == 0
    on_plateau = collapsed and abs(row["d_loss"] - PLATEAU[game]) < 0.02
    start = {"covered_at": -1, "collapsed": 0, "on_plateau": 0}
    before = earlier[-1] if earlier else start
    first = epochs if covers and before["covered_at"] < 0 else before["covered_at"]
    return {
        "covers": int(covers),
        "covered_at": first,
        "collapsed": before["collapsed"] + collapsed,
        "on_plateau": before["on_plateau"] + on_plateau,
    }


@torch.no_grad()
def collapse(generator: nn.Sequential, z: Tensor) -> None:
    """Let every seed's fakes cover the first cluster alone, by scaling and moving the outputs."""
    last, fake = generator[-1], generator(z)
    scale = SPREAD / 4 / fake.std(-1, keepdim=True)
    last.weight *= scale
    last.bias.sub_(fake.mean(-1, keepdim=True)).mul_(scale).add_(SPREAD / 2)


def train(config: Config, options: study.Options, line: int) -> None:
    rngs = seeds.generators(config)
    real, z = rngs.draw(clusters), rngs.draw(noises)
    g_sizes = [1, config.generator_width, config.generator_width, 1]
    d_sizes = [1, config.discriminator_width, config.discriminator_width, 1]
    g = seeds.perceptrons(g_sizes, "tanh", rngs)
    d = seeds.perceptrons(d_sizes, "sigmoid", rngs)
    rates = config.generator_learning_rate, config.discriminator_learning_rate
    g_optimizer = torch.optim.SGD(g.parameters(), rates[0], config.momentum)
    d_optimizer = torch.optim.SGD(d.parameters(), rates[1], config.momentum)
    game = seeds.SideBySide(GAMES[config.game], config.seeds)
    if config.start == "collapsed":
        collapse(g, z)
        for _ in range(ALONE):
            d_loss = game.discriminator_loss(d, g(z).detach(), real)
            study.step(d_optimizer, d_loss)
    d_losses = game.discriminator_losses(d, g(z), real).tolist()

    @torch.no_grad()
    def evaluate(epochs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        fake = g(z)
        updates = epochs * (config.generator_steps + config.discriminator_steps)
        each = []
        for seed, loss in enumerate(d_losses):
            row = {"d_loss": loss, **counts(fake[seed])}
            each.append(row | landmarks(epochs, row, seeds.of_seed(earlier, seed), config.game))
        return {"player_updates": updates, "each": each}, fake[:, 0].cpu()

    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **config.look_ahead)
    parts = {"g": g, "d": d, "g_sgd": g_optimizer, "d_sgd": d_optimizer}
    for _ in runs.iterate(config, options, line, parts, rngs, evaluate):
        fake = g(z).detach()
        for _ in range(config.discriminator_steps):
            study.step(d_optimizer, game.discriminator_loss(d, fake, real))
        d_losses = game.discriminator_losses(d, fake, real).tolist()

        for _ in range(config.generator_steps):
            study.step(g_optimizer, unrolled(g(z), real))


def rows(record: str, config: Config, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    size = {"pairs": config.epochs * config.generator_steps, "batch_size": SAMPLES}
    return [row | size for row in study.last_rows(record, config, log)]


def panels(
    path: Path, labels: Sequence[str], draw: Callable[[Axes, str], object], **shown: Any
) -> None:
    """Draw a panel a setting."""
    size = 2.6 * len(labels) + 0.4, 2.6
    how = {"sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(labels), figsize=size, **how)
    for ax, label in zip(axes[0], labels, strict=True):
        draw(ax, label)
        ax.set(title=label, xlabel="epochs", **shown)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0)
        ax.label_outer()
    save(figure, path)


def report(results: study.Results) -> str:
    """Draw D's loss of every seed beside its landmarks, and where the first seed's samples are."""
    results.table("covers", "collapsed", "on_plateau", "d_loss")
    name = "two_clusters" + "_collapsed" * (results.first.start == "collapsed")
    games = {config.label: config.game for config in results.configs}
    losses = results.frame.pivot(index="epochs", columns=["setting", "seed"], values="d_loss")
    epochs = losses.index
    data = clusters(torch.Generator().manual_seed(results.first.first_seed))[0]

    def loss(ax: Axes, label: str) -> None:
        for landmark, level in (("collapsed", PLATEAU[games[label]]), ("matched", MATCHED)):
            ax.axhline(level, color="0.5", linestyle="--", linewidth=1)
            ax.text(epochs[-1], level, landmark, ha="right", va="bottom", color="0.4")
        ax.plot(losses[label], color="C0", linewidth=0.6, alpha=0.6)

    def paths(ax: Axes, label: str) -> None:
        fakes = [fake[0].numpy() for fake in results.first_logs[label]["snapshots"]]
        ax.hlines(data.numpy(), epochs[0], epochs[-1], color="C3", linewidth=0.4, alpha=0.25)
        ax.plot(epochs, np.array(fakes), color="C0", linewidth=0.4, alpha=0.5)

    folder, labels = results.folder, list(games)
    panels(folder / f"{name}_loss.png", labels, loss, ylim=(0, 1), ylabel="D's loss")
    shown = {"ylim": (-2, 6), "ylabel": "data (red) and generated (blue)"}
    panels(folder / f"{name}_data.png", labels, paths, **shown)
    return results.sentence("covers", "covers both in a share of {} of the models")


SWEEP = {"unroll_steps": (0, 5), "game": ("JS", "Rp")}
HOOKS = {"options": study.Options(seeds=20), "rows": rows}
main = partial(study.main, __doc__, PRESETS, train, report, "two_clusters", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
