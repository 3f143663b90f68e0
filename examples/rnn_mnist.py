"""An LSTM that draws MNIST digits column by column, without and with unrolling.

Section 3.2, Fig. 3 and Appendix C of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163): a recurrent generator against a
convolutional discriminator. Its claims: without unrolling (K = 0) the generator quickly collapses
and "rotates through a sequence of single modes"; with K = 20 it "disperses and appears to cover the
whole data distribution".

Seeds are trained side by side. Each model and its random draws are the same as when trained alone.

    python examples/rnn_mnist.py                        K = 0 and 20 at a small scale
    python examples/rnn_mnist.py --preset paper         Appendix C, for a GPU or patience
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lab import runs, seeds, study
from lab.data import digits
from lab.data.mixtures import rotation
from lab.data.pixels import as_bytes
from lab.figures import images
from lab.metrics import classifier, coverage
from lab.networks import joined
from torch import Tensor, nn

import unroll

GAMES = {"minimax": unroll.Minimax(), "non-saturating": unroll.NonSaturating()}
SIDE = 28
CURVES = {
    "classes": "digits covered",
    "class_entropy": "entropy of the digits",
    "spread": "variance, of the data's",
    "largest_mode": "digit that most are",
}


@dataclass(frozen=True)
class Config(study.SideBySide):
    """One run: Appendix C. "Ours" marks a choice where the paper is silent."""

    unroll_steps: int = 20  # K, look-ahead steps of D in G's loss
    # Appendix C's -L_G and -L_D: both are printed with their signs off
    game: Literal["minimax", "non-saturating"] = "non-saturating"  # as Appendix C's L_G
    learning_rate: float = 1e-4  # Adam's, of both players
    beta1: float = 0.5  # Adam's
    noise_size: int = 256  # of the generator's input
    width: int = 256  # of the LSTM and the layer before it
    initial_state: Literal["both", "hidden", "cell"] = "both"  # what the noise becomes (ours)
    compile: bool = True  # compile the look-ahead step and its adjoint
    samples: int = 10_000  # behind every metric (ours)
    classifier: str = ""
    classifier_accuracy: float = 0.0
    evaluate_every: int = 1500  # pairs
    record_every: int = 15_000  # pairs
    pairs: int = 75_000  # of updates, D first (ours); 150k updates of either
    batch_size: int = 64  # ours


PAPER = Config()
SMALL = {"samples": 128, "evaluate_every": 10, "record_every": 50, "pairs": 200, "batch_size": 16}
PRESETS = {"small": replace(PAPER, preset="small", learning_rate=1e-3, **SMALL), "paper": PAPER}


@dataclass(frozen=True)
class Options(classifier.Options):
    """The length of K = 0, the files and the runs."""

    standard_pairs: int | None = None  # at K = 0, to compare at equal time too; else as many


class Generator(nn.Module):
    """An LSTM whose initial state is the noise and whose outputs are the columns of an image."""

    def __init__(
        self, noise_size: int, width: int, initial_state: str, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.first = nn.Linear(noise_size, width)
        self.lstm = nn.LSTM(1, width, batch_first=True)
        self.last = nn.Linear(width, SIDE)
        self.initial_state = initial_state
        xavier(self, rng)
        forget = slice(width, 2 * width)  # of the gates i, f, g, o
        self.lstm.bias_ih_l0.data[forget] = 1.0  # nn.LSTM adds two biases: 1 in total

    def forward(self, z: Tensor) -> Tensor:
        """Return images, `(N, 1, 28, 28)` in [-1, 1]."""
        noise = self.first(z).relu().unsqueeze(0)
        nothing = torch.zeros_like(noise)
        hidden = nothing if self.initial_state == "cell" else noise
        cell = nothing if self.initial_state == "hidden" else noise
        columns, _ = self.lstm(z.new_zeros(len(z), SIDE, 1), (hidden, cell))
        return self.last(columns).tanh().mT.unsqueeze(1)


def discriminator(rng: torch.Generator) -> nn.Sequential:
    """Return the convolutional D of Appendix C; kernels of 3x3 as in Appendix D."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.3),
        ]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 1))
    xavier(network, rng)
    return network


def xavier(network: nn.Module, rng: torch.Generator) -> None:
    """Initialise weights as Glorot & Bengio (2010), and biases to zero."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=rng)
        elif "bias" in name:
            nn.init.zeros_(parameter)


def networks(config: Config, rng: torch.Generator) -> tuple[nn.Module, nn.Sequential]:
    """Return G and D."""
    g = Generator(config.noise_size, config.width, config.initial_state, rng)
    return g, discriminator(rng)


def train(config: Config, options: Options, line: int) -> None:
    weights = seeds.generators(replace(config, device="cpu"))
    g, d = joined.players(weights, partial(networks, config))
    g.to(config.device)
    d.to(config.device)
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(g.parameters(), config.learning_rate, betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.learning_rate, betas)
    data = digits.mnist(options.data_root).to(config.device)
    counter = classifier.load(options.classifier, config.device)
    variance = data.at(torch.arange(config.samples, device=config.device)).var(0).sum()
    rngs = seeds.generators(config)

    def noise(count: int = config.batch_size) -> Tensor:
        return rngs.normal(count, config.noise_size)

    def real() -> Tensor:
        return joined.last(rngs.draw(partial(data.sample, config.batch_size)))

    held_out = noise(config.samples)
    known = data.at(slice(classifier.REFERENCES))
    ticked = time.process_time()

    @torch.no_grad()
    def evaluate(pairs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        nonlocal ticked
        spent = (time.process_time() - ticked) / config.seeds if pairs else 0.0
        recorded, each = pairs % config.record_every == 0, []
        for number, one in enumerate(g):
            samples = torch.cat([one(z) for z in held_out[number].split(1000)])
            found = coverage.class_metrics(classifier.classify(counter, samples))
            row = {
                "classes": found["classes"],
                "class_entropy": found["class_entropy"],
                "largest_mode": found["dominant_class"],
                "largest_mode_share": found["dominant_share"],
                "spread": (samples.var(0).sum() / variance).item(),
                "precision": classifier.precision(counter, samples, known) if recorded else "",
            }
            own = seeds.of_seed(earlier, number)
            before = own[-1]["cpu_seconds"] if own else 0.0
            each.append(row | rotation([*own, row]) | {"cpu_seconds": round(before + spent, 2)})
        shown = g[0](held_out[0, :16])
        ticked = time.process_time()
        return {"player_updates": 2 * pairs, "each": each}, as_bytes(shown).cpu()

    game = seeds.SideBySide(GAMES[config.game], config.seeds)
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, **config.look_ahead)
    parts = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    for _ in runs.iterate(config, options, line, parts, rngs, evaluate):
        batch = real()
        d_loss = game.discriminator_loss(d, g(noise()).detach(), batch)
        study.step(d_optimizer, d_loss)

        g_loss = unrolled(g(noise()), real())
        study.step(g_optimizer, g_loss)


def rows(record: str, config: Config, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        row | {"compile": config.compile}
        for row in study.model_rows(record, config, log)
        if row["pairs"] == config.pairs
        or (row["pairs"] and row["pairs"] % config.record_every == 0)
    ]


def report(results: study.Results) -> str:
    table = "classes", "class_entropy", "spread", "largest_mode_changes", "rotations", "cpu_seconds"
    ideal = {"classes": 10.0, "class_entropy": math.log(10), "spread": 1.0}
    how = {"curves": CURVES, "table": table, "ideal": ideal}
    images.report("rnn_mnist", results, **how)
    return results.sentence("classes", "draws {} of 10 digits")


def arms(configs: Sequence[Config], options: Options) -> list[Config]:
    judge = classifier.prepared(options)
    standard = options.standard_pairs
    return [
        replace(c, **judge, pairs=c.pairs if c.unroll_steps else standard or c.pairs)
        for c in configs
    ]


SWEEP = {"unroll_steps": (0, 20)}
HOOKS = {"options": Options(), "arms": arms, "rows": rows}
main = partial(study.main, __doc__, PRESETS, train, report, "rnn_mnist", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
