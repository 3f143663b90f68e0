"""An LSTM that draws MNIST digits column by column, without and with unrolling.

Section 3.2, Fig. 3 and Appendix C of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163): a recurrent generator against a
convolutional discriminator. Its claims: without unrolling (K=0) the generator quickly collapses and
"rotates through a sequence of single modes"; with K=20 it "disperses and appears to cover the whole
data distribution".

    python examples/train_classifier.py                 once: what tells digits apart
    python examples/rnn_mnist.py                        K=0 and K=20, preset small
    python examples/rnn_mnist.py --preset paper         Appendix C, for a GPU or patience
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import cli, records, runs
from lab.data import digits
from lab.data.mixtures import rotation
from lab.data.pixels import as_bytes
from lab.figures import rnn
from lab.metrics import classifier, coverage
from lab.networks import lstm
from torch import Tensor

import unroll

SHOWN = 16  # samples of each evaluation that are kept for the figure
GAMES = {"minimax": unroll.Minimax(), "non-saturating": unroll.NonSaturating()}


@dataclass(frozen=True)
class Config:
    """One run. The defaults are Appendix C; "ours" marks a choice where the paper is silent."""

    preset: str = "paper"
    unroll_steps: int = 20
    game: str = (
        "non-saturating"  # Appendix C's -L_G and -L_D: both are printed with their signs off
    )
    learning_rate: float = 1e-4
    beta1: float = 0.5
    noise_size: int = 256
    width: int = 256
    initial_state: str = "both"  # of the LSTM: its hidden state, its cell or both (ours)
    compile: bool = False
    samples: int = 10_000  # behind every metric (ours)
    classifier: str = ""  # the hash of what counts them
    classifier_accuracy: float = 0.0  # percent of the test digits
    evaluate_every: int = 1500
    record_every: int = 15_000
    device: str = "cpu"
    seed: int = 0
    pairs: int = 75_000  # of updates, D first (ours); 150k updates of either
    batch_size: int = 64  # ours

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        cli.check(self, pairs="iterations", learning_rate="learning-rate")

    def checkpoint(self, folder: Path) -> Path:
        """Return where the run is kept."""
        name = f"{self.preset}-K{self.unroll_steps}-seed{self.seed}.pt"
        return folder / "checkpoints" / name


PRESETS = {
    "small": Config(
        "small",
        learning_rate=1e-3,
        samples=128,
        evaluate_every=10,
        record_every=50,
        pairs=200,
        batch_size=16,
    ),
    "paper": Config("paper"),
}


def train(
    config: Config,
    line: int,
    *,
    folder: Path,
    resume: bool,
    data_root: Path | None,
    classifier_file: Path | None,
) -> Config:
    """Train one GAN; what comes of it is in its checkpoint."""
    torch.set_num_threads(1)  # the networks are small
    weights = torch.Generator().manual_seed(config.seed)
    generator = lstm.Generator(config.noise_size, config.width, config.initial_state, weights)
    d = lstm.discriminator(weights).to(config.device)
    generator.to(config.device)
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(generator.parameters(), config.learning_rate, betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.learning_rate, betas)
    data = digits.mnist(data_root).to(config.device)
    counter = classifier.load(classifier_file, config.device)
    variance = data.at(torch.arange(config.samples, device=config.device)).var(0).sum()
    rng = torch.Generator(config.device).manual_seed(config.seed)

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, config.noise_size, generator=rng, device=config.device)

    held_out = noise(config.samples)
    ticked = time.process_time()

    @torch.no_grad()
    def evaluate(pairs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        nonlocal ticked
        spent = time.process_time() - ticked if pairs else 0.0
        before = earlier[-1]["cpu_seconds"] if earlier else 0.0
        samples = torch.cat([generator(z) for z in held_out.split(1000)])
        found = coverage.class_metrics(classifier.classify(counter, samples))
        row = {
            "player_updates": 2 * pairs,
            "classes": found["classes"],
            "class_entropy": found["class_entropy"],
            "largest_mode": found["dominant_class"],
            "largest_mode_share": found["dominant_share"],
            "spread": (samples.var(0).sum() / variance).item(),
        }
        row |= rotation([*earlier, row]) | {"cpu_seconds": round(before + spent, 2)}
        ticked = time.process_time()
        return row, as_bytes(samples[:SHOWN]).cpu()

    iterations = runs.iterate(
        config.checkpoint(folder),
        asdict(config),
        {"g": generator, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer},
        rng,
        evaluate,
        length=config.pairs,
        every=config.evaluate_every,
        resume=resume,
        bar={
            "desc": f"K={config.unroll_steps} seed {config.seed}",
            "position": line,
            "unit": "pair",
        },
    )

    game = GAMES[config.game]
    unrolled = unroll.UnrolledGeneratorLoss(
        d, d_optimizer, game, unroll_steps=config.unroll_steps, compile=config.compile
    )
    for _ in iterations:
        real = data.sample(config.batch_size, rng)
        d_loss = game.discriminator_loss(d, generator(noise()).detach(), real)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()

        g_loss = unrolled(generator(noise()), data.sample(config.batch_size, rng))
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of a finished run: a row for every `record_every` pairs."""
    rows = []
    for result in log["history"]:
        pairs = result["pairs"]
        if not pairs or (pairs % config.record_every and pairs != config.pairs):
            continue
        rows.append(records.row("rnn_mnist", config, result, log))
    return rows


def arguments() -> argparse.ArgumentParser:
    """Return the command line, explained in the paper's terms."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    cli.add_unroll_steps(add, 0, 20)
    add("--game", choices=GAMES, help="default: non-saturating, as Appendix C's L_G")
    add(
        "--initial-state",
        choices=lstm.STATES,
        help="what of the LSTM's state the noise becomes (default: both); the paper does not say",
    )
    add("--compile", action="store_true", help="compile the look-ahead step and its adjoint")
    add = parser.add_argument_group("the experiment").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="small",
        help="paper: Appendix C, 75,000 pairs of updates. small (default): the same networks, with "
        "batches of 16 for 64, 200 pairs and learning rates of 1e-3 for 1e-4",
    )
    add("--learning-rate", type=float, metavar="ETA", help="Adam's, for both")
    add("--batch-size", type=cli.positive, metavar="N", help="default: the preset's")
    cli.add_iterations(add, "of one D and one G update; the paper counts single ones")
    add(
        "--standard-iterations",
        dest="standard",
        type=int,
        metavar="PAIRS",
        help="the same at K=0, to compare at equal time too (default: as many)",
    )
    add("--samples", type=cli.positive, metavar="N", help="behind every metric")
    add("--evaluate-every", type=cli.positive, metavar="PAIRS", help="default: the preset's")
    add("--record-every", type=cli.positive, metavar="PAIRS", help="default: the preset's")
    classifier.add_classifier_flag(parser)
    digits.add_data_flag(parser)
    cli.add_run_flags(parser, "rnn_mnist", figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the runs that the command line asks for; what they need must be there."""
    root, file = given.get("data_root"), given.get("classifier")
    digits.mnist(root)
    classifier.load(file)
    facts = classifier.facts(file)
    judge = {"classifier": facts["hash"], "classifier_accuracy": facts["test_accuracy"]}
    base = replace(cli.chosen(given, PRESETS), **judge)
    standard = given.get("standard", base.pairs)
    first = given["seed"]
    return [
        replace(base, unroll_steps=k, seed=seed, pairs=base.pairs if k else standard)
        for k in dict.fromkeys(given["steps"])
        for seed in range(first, first + given["seeds"])
    ]


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    task = partial(train, data_root=args.data_root, classifier_file=args.classifier)
    configs = cli.carry_out(parser, args, build, task, record_rows, keep=True)
    rnn.report(args.out, args.figures or args.out, configs)


if __name__ == "__main__":
    main()
