"""The original GAN on MNIST: Adam against SGD, without and with looking ahead.

The README of https://github.com/drawcodeboy/GAN trains a perceptron GAN (Goodfellow et al. 2014) on
MNIST with Adam and with plain SGD, both at a learning rate of 2e-4. With SGD all of its samples are
the same, which it explains so: under SGD the discriminator's gradients are too weak to learn that a
pattern which it takes for real is not, and so the generator stays with the pattern. Here that is
measured: D's gradients, how far its updates move it, what it says of the generator's most typical
sample ("the pattern") and whether it has learned about it by the next evaluation.

    Adam            2e-4, betas (0.5, 0.999)
    SGD             2e-4, no momentum
    SGD-fast        a hundred times that rate: few pairs at 2e-4 hardly move SGD at all
    momentum        0.002 and momentum 0.9: as far a pair as SGD-fast
    SGD-fast-eps    as above, with 1e-5 for the 0.8 that is the eps of that README's BatchNorm
    momentum-eps    likewise

The last two test another explanation: with an eps far above the variance of its inputs, BatchNorm
does not normalise, and what the noise does to the samples fades from layer to layer. Adam can do
something about it, whose steps do not shrink with the gradients.

    python examples/gan_mnist.py                     the arms, K=0 and K=5, at a small scale
    python examples/gan_mnist.py --preset paper      that README's 200 epochs
    python examples/gan_mnist.py --generate runs/gan_mnist/checkpoints/Adam-K0-seed0.pt
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lab import cli, records, runs
from lab.data import digits
from lab.data.pixels import as_bytes
from lab.figures import gan_mnist
from lab.metrics import classifier, coverage
from lab.trace import Trace
from torch import Tensor, nn
from torch.nn.utils import get_total_norm, parameters_to_vector

import unroll

EPS = 0.8  # that README's BatchNorm1d(n, 0.8), where the code it is taken from means a momentum
OPTIMIZERS = {  # learning rate, momentum and BatchNorm's eps; all but the first two are ours
    "Adam": (2e-4, 0.0, EPS),
    "SGD": (2e-4, 0.0, EPS),
    "SGD-fast": (0.02, 0.0, EPS),
    "momentum": (0.002, 0.9, EPS),
    "SGD-fast-eps": (0.02, 0.0, 1e-5),
    "momentum-eps": (0.002, 0.9, 1e-5),
}


@dataclass(frozen=True)
class Config:
    """One run. The defaults are that README's; "ours" marks a choice where it is silent."""

    preset: str = "paper"
    classifier: str = ""  # the hash of what counts the classes
    classifier_accuracy: float = 0.0  # percent of the test digits
    optimizer: str = "Adam"
    lr: float = 2e-4  # of both networks
    momentum: float = 0.0
    beta1: float = 0.5
    batch_norm_eps: float = EPS
    unroll_steps: int = 0  # ours
    noise_size: int = 100
    samples: int = 10_000  # ours, behind every metric
    evaluate_every: int = 9370
    device: str = "cpu"
    seed: int = 0
    pairs: int = 187_400  # 200 epochs of 937 batches
    batch_size: int = 64  # drawn from all of the data, where that README goes through it by epochs

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        cli.check(self, pairs="iterations", lr="lr")

    @property
    def label(self) -> str:
        """Return the name of the setting in figures."""
        return f"{self.optimizer}, K = {self.unroll_steps}"

    def checkpoint(self, folder: Path) -> Path:
        """Return where the run is kept."""
        name = f"{self.optimizer}-K{self.unroll_steps}-seed{self.seed}.pt"
        return folder / "checkpoints" / name


PRESETS = {
    "small": Config("small", pairs=1000, evaluate_every=250),
    "paper": Config("paper"),
}


def generator_of(noise_size: int, eps: float) -> nn.Sequential:
    """Return that README's generator of `(N, 784)` images in [0, 1]."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((noise_size, 128, 256, 512, 1024)):
        normalise = nn.BatchNorm1d(outputs, eps)
        layers += [nn.Linear(inputs, outputs), normalise, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(1024, 784), nn.Sigmoid())


def discriminator_of() -> nn.Sequential:
    """Return that README's discriminator, which ends in a sigmoid."""
    hidden = [nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(256, 1), nn.Sigmoid())


def optimizer_of(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    """Return what trains a network."""
    if config.optimizer == "Adam":
        return torch.optim.Adam(network.parameters(), config.lr, (config.beta1, 0.999))
    return torch.optim.SGD(network.parameters(), config.lr, config.momentum)


def train(
    config: Config,
    line: int,
    *,
    folder: Path,
    resume: bool,
    data_root: Path | None = None,
    classifier_file: Path | None = None,
) -> Config:
    """Train one GAN; what comes of it is in its checkpoint."""
    torch.set_num_threads(1)  # a process a core
    torch.manual_seed(config.seed)
    rng = torch.Generator(config.device).manual_seed(config.seed)
    data = digits.mnist(data_root).to(config.device)
    judge = classifier.load(classifier_file, config.device)
    generator = generator_of(config.noise_size, config.batch_norm_eps).to(config.device)
    discriminator = discriminator_of().to(config.device)
    g_optimizer, d_optimizer = (optimizer_of(config, net) for net in (generator, discriminator))
    trace = Trace("d_loss", "g_loss", "d_gradient", "d_update", "seconds")

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, config.noise_size, generator=rng, device=config.device)

    def real(count: int = config.batch_size) -> Tensor:
        return data.sample(count, rng).flatten(1).add(1).div(2)

    held_out, held_out_real = noise(config.samples), real(config.samples)
    spread = held_out_real.var(0).sum()

    @torch.no_grad()
    def evaluate(pairs: int, history: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        generator.eval()  # as that README samples
        fake = generator(held_out)
        generator.train()
        pattern = fake[(fake - fake.mean(0)).norm(dim=1).argmin()]
        before, seen = history[-1] if history else None, trace.kept
        learned = float("nan")
        if before is not None:
            learned = before["d_on_pattern"] - discriminator(seen[before["pairs"]]).item()
        trace.kept[pairs] = pattern.clone()
        images = fake.view(-1, 1, 28, 28) * 2 - 1
        labels = classifier.classify(judge, images)
        of_a_percent = coverage.counts(labels, digits.CLASSES) >= config.samples / 100
        start = before["pairs"] if before is not None else 0
        row = {
            "player_updates": 2 * pairs,
            **coverage.class_metrics(labels),
            "classes_of_a_percent": int(of_a_percent.sum()),
            "variance": (fake.var(0).sum() / spread).item(),
            **{c: trace.mean(c, start) for c in ("d_loss", "g_loss", "d_gradient", "d_update")},
            "d_on_real": discriminator(held_out_real).mean().item(),
            "d_on_fake": discriminator(fake).mean().item(),
            "d_on_pattern": discriminator(pattern).item(),
            "learned": learned,
            "seconds_a_pair": trace.median("seconds"),
        }
        return row, as_bytes(images[:49]).cpu()

    parts: dict[str, runs.Stateful] = {"g": generator, "d": discriminator, "trace": trace}
    parts |= {"g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    iterations = runs.iterate(
        config.checkpoint(folder),
        asdict(config),
        parts,
        rng,
        evaluate,
        length=config.pairs,
        every=config.evaluate_every,
        resume=resume,
        bar={"desc": f"{config.label} seed {config.seed}", "position": line, "unit": "pair"},
    )

    game = unroll.Criterion(nn.BCELoss())
    unrolled = unroll.UnrolledGeneratorLoss(
        discriminator, d_optimizer, game, unroll_steps=config.unroll_steps
    )
    for _ in iterations:
        began = time.process_time()
        images = real()
        d_loss = game.discriminator_loss(discriminator, generator(noise()).detach(), images)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_gradient = get_total_norm([p.grad for p in discriminator.parameters()])
        before = parameters_to_vector(discriminator.parameters()).detach()
        d_optimizer.step()
        d_update = (parameters_to_vector(discriminator.parameters()).detach() - before).norm()

        g_loss = unrolled(generator(noise()), images)
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        spent = time.process_time() - began
        of_d = {"d_loss": d_loss, "d_gradient": d_gradient, "d_update": d_update}
        trace.add(**of_d, g_loss=g_loss, seconds=spent)
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of a run: settings, last metrics, and means over its evaluations."""
    last, trained = log["history"][-1], log["history"][1:]
    means = {
        f"mean_{c}": sum(row[c] for row in trained) / len(trained) for c in gan_mnist.EXPLANATION
    }
    fooled = sum(row["d_on_pattern"] > 0.5 for row in trained) / len(trained)
    result = {"player_updates": 2 * config.pairs, **last, **means, "taken_for_real": fooled}
    result["images_a_second"] = config.batch_size / last["seconds_a_pair"]
    return [records.row("gan_mnist", config, result, log)]


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    add(
        "--optimizers",
        nargs="+",
        choices=OPTIMIZERS,
        default=list(OPTIMIZERS),
        help="of both networks (default: all)",
    )
    cli.add_unroll_steps(add, 0, 5)
    add = parser.add_argument_group("the experiment").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="small",
        help=f"paper: that README's 200 epochs, 187,400 pairs. small (default): "
        f"{PRESETS['small'].pairs:,} pairs, all else the same",
    )
    add("--lr", type=float, metavar="ETA", help="for all optimizers (default: each its own)")
    cli.add_iterations(add)
    add("--evaluate-every", type=cli.positive, metavar="PAIRS", help="default: the preset's")
    add("--samples", type=cli.positive, metavar="N", help="behind every metric (default: 10000)")
    add(
        "--generate",
        type=Path,
        metavar="CHECKPOINT",
        help="train nothing: write 49 samples of this run into --out, one a file and in a grid",
    )
    digits.add_data_flag(parser)
    classifier.add_classifier_flag(parser)
    cli.add_run_flags(parser, "gan_mnist", figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the runs that the command line asks for."""
    facts = classifier.facts(given.get("classifier"))
    judge = {"classifier": facts["hash"], "classifier_accuracy": facts["test_accuracy"]}
    base = replace(cli.chosen(given, PRESETS), **judge)
    configs = []
    for seed in range(given["seed"], given["seed"] + given["seeds"]):
        for k in dict.fromkeys(given["steps"]):
            for name in dict.fromkeys(given["optimizers"]):
                rate, momentum, eps = OPTIMIZERS[name]
                arm = {"optimizer": name, "lr": given.get("lr", rate), "momentum": momentum}
                own = {"batch_norm_eps": eps, "unroll_steps": k, "seed": seed}
                configs.append(replace(base, **arm, **own))
    return configs


def main() -> None:
    """Train what the command line asks for, record it and draw it; or generate."""
    parser = arguments()
    args = parser.parse_args()
    try:
        if args.generate is not None:
            folder = gan_mnist.generate(args.generate, args.out, generator_of, args.seed)
            print(f"Samples are in {folder}/")
            return
        digits.mnist(args.data_root)
        classifier.load(args.classifier)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    task = partial(train, data_root=args.data_root, classifier_file=args.classifier)
    configs = cli.carry_out(parser, args, build, task, record_rows, keep=True)
    gan_mnist.report(args.out, args.figures or args.out, configs)


if __name__ == "__main__":
    main()
