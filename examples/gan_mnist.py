"""The original GAN on MNIST: Adam against SGD, without and with looking ahead.

The README of https://github.com/drawcodeboy/GAN trains a perceptron GAN (Goodfellow et al. 2014) on
MNIST with Adam and with plain SGD, both at a learning rate of 2e-4. With SGD all of its samples are
the same. Its explanation: under SGD the discriminator's gradients are too weak to learn that a
pattern is fake, so the generator stays with the pattern. This script measures D's gradients, how
far its updates move it, D's output on the generator's most typical sample ("the pattern"), and
how far this output has changed by the next evaluation.

    Adam            2e-4, betas (0.5, 0.999)
    SGD             2e-4, no momentum
    SGD-fast        a hundred times that rate: few pairs at 2e-4 hardly move SGD at all
    momentum        0.002 and momentum 0.9: the effective rate of SGD-fast
    SGD-fast-eps    SGD-fast with BatchNorm's eps at 1e-5; the README has 0.8
    momentum-eps    momentum with the same eps

The last two test another explanation: with an eps far above the variance of its inputs, BatchNorm
does not normalise, and the effect of the noise on the samples fades from layer to layer. Adam can
counteract this, because its steps do not shrink with the gradients.

    python examples/gan_mnist.py                     the arms, K = 0 and 5, at a small scale
    python examples/gan_mnist.py --preset paper      that README's 200 epochs
    python examples/gan_mnist.py --generate runs/gan_mnist/checkpoints/Adam-K0-seed0.pt
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lab import runs, study
from lab.data import digits
from lab.data.pixels import as_bytes
from lab.figures import images
from lab.metrics import classifier, coverage
from lab.trace import Trace
from torch import Tensor, nn
from torch.nn.utils import get_total_norm, parameters_to_vector
from tqdm import tqdm

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
EXPLANATION = {
    "d_gradient": "norm of D's gradient",
    "d_update": "norm of D's update",
    "d_on_real": "D(data)",
    "d_on_fake": "D(samples)",
    "d_on_pattern": "D(pattern)",
    "learned": "fall of D(pattern)",
}
CURVES = EXPLANATION | {"variance": "variance / data's", "class_entropy": "entropy of the digits"}


@dataclass(frozen=True)
class Config(study.OneModel):
    """One run, that README's. "Ours" marks a choice where it is silent."""

    classifier: str = ""
    classifier_accuracy: float = 0.0
    optimizer: Literal[tuple(OPTIMIZERS)] = "Adam"  # of both networks, see above
    learning_rate: float | None = None  # of both networks, if not the optimizer's own
    momentum: float = 0.0
    beta1: float = 0.5  # Adam's
    batch_norm_eps: float = EPS
    unroll_steps: int = 0  # K, look-ahead steps of D in G's loss (ours)
    noise_size: int = 100  # of the generator's input
    samples: int = 10_000  # behind every metric (ours)
    evaluate_every: int = 9370  # pairs
    pairs: int = 187_400  # 200 epochs of 937 batches
    batch_size: int = 64  # drawn from all of the data, where that README goes through it by epochs

    @property
    def label(self) -> str:
        return f"{self.optimizer}, K = {self.unroll_steps}"


PAPER = Config()
PRESETS = {"small": replace(PAPER, preset="small", pairs=1000, evaluate_every=250), "paper": PAPER}


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
    """Return the optimizer of a network."""
    if config.optimizer == "Adam":
        return torch.optim.Adam(network.parameters(), config.learning_rate, (config.beta1, 0.999))
    return torch.optim.SGD(network.parameters(), config.learning_rate, config.momentum)


def train(config: Config, options: classifier.Options, line: int) -> None:
    torch.manual_seed(config.seed)
    rng = torch.Generator(config.device).manual_seed(config.seed)
    data = digits.mnist(options.data_root).to(config.device)
    judge = classifier.load(options.classifier, config.device)
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
    known = data.at(slice(classifier.REFERENCES))

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
        samples = fake.view(-1, 1, 28, 28) * 2 - 1
        labels = classifier.classify(judge, samples)
        of_a_percent = coverage.counts(labels, digits.CLASSES) >= config.samples / 100
        start = before["pairs"] if before is not None else 0
        row = {
            "player_updates": 2 * pairs,
            **coverage.class_metrics(labels),
            "classes_of_a_percent": int(of_a_percent.sum()),
            "variance": (fake.var(0).sum() / spread).item(),
            "precision": classifier.precision(judge, samples, known),
            **{c: trace.mean(c, start) for c in ("d_loss", "g_loss", "d_gradient", "d_update")},
            "d_on_real": discriminator(held_out_real).mean().item(),
            "d_on_fake": discriminator(fake).mean().item(),
            "d_on_pattern": discriminator(pattern).item(),
            "learned": learned,
            "seconds_a_pair": trace.median("seconds"),
        }
        return row, as_bytes(samples[:49]).cpu()

    game = unroll.Criterion(nn.BCELoss())
    unrolled = unroll.UnrolledGeneratorLoss(discriminator, d_optimizer, game, **config.look_ahead)
    parts = {"g": generator, "d": discriminator, "trace": trace}
    parts |= {"g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    for _ in runs.iterate(config, options, line, parts, rng, evaluate):
        began = time.process_time()
        batch = real()
        d_loss = game.discriminator_loss(discriminator, generator(noise()).detach(), batch)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_gradient = get_total_norm([p.grad for p in discriminator.parameters()])
        before = parameters_to_vector(discriminator.parameters()).detach()
        d_optimizer.step()
        d_update = (parameters_to_vector(discriminator.parameters()).detach() - before).norm()

        g_loss = unrolled(generator(noise()), batch)
        study.step(g_optimizer, g_loss)
        spent = time.process_time() - began
        of_d = {"d_loss": d_loss, "d_gradient": d_gradient, "d_update": d_update}
        trace.add(**of_d, g_loss=g_loss, seconds=spent)


def rows(record: str, config: Config, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    trained = pd.DataFrame(log["history"][1:])
    (row,) = study.last_rows(record, config, log)
    row |= trained[list(EXPLANATION)].mean().add_prefix("mean_").to_dict()
    row["taken_for_real"] = (trained["d_on_pattern"] > 0.5).mean()
    row["images_a_second"] = config.batch_size / row["seconds_a_pair"]
    row["lr"] = row.pop("learning_rate")
    return [row]


def report(results: study.Results) -> str:
    table = "classes_of_a_percent", "class_entropy", "variance", "d_gradient", "d_update"
    how = {"curves": CURVES, "table": table, "ideal": {"d_on_pattern": 0.5, "variance": 1.0}}
    images.report("gan_mnist_samples", results, **how)
    return results.sentence("variance", "has {} of the data's variance")


@dataclass(frozen=True)
class Options(classifier.Options):
    """Samples of a finished run, the files and the runs."""

    generate: Path | None = None  # train nothing: write 49 samples of this checkpoint into --out


def arms(configs: Sequence[Config], options: Options) -> list[Config]:
    if options.generate is not None:
        where = generate(options.generate, options.out, options.first_seed)
        tqdm.write(f"Samples are in {where}/.")
        sys.exit()
    judge = classifier.prepared(options)
    return [own(replace(config, **judge)) for config in configs]


def own(config: Config) -> Config:
    """Return settings with the rate, momentum and eps of their arm."""
    rate, momentum, eps = OPTIMIZERS[config.optimizer]
    rate = config.learning_rate or rate
    return replace(config, learning_rate=rate, momentum=momentum, batch_norm_eps=eps)


def generate(checkpoint: Path, folder: Path, seed: int, count: int = 49) -> Path:
    """Write new samples of a trained generator, each to a file and all to a grid."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        settings = content["settings"]
        generator = generator_of(settings["noise_size"], settings["batch_norm_eps"]).eval()
        generator.load_state_dict(content["parts"]["g"])
    except Exception as error:  # pickle, zip and torch have one each
        raise ValueError(
            f"--generate must be a checkpoint of gan_mnist.py, {checkpoint} is none ({error}): "
            "they are in the folder checkpoints/ of --out"
        ) from error
    target = folder / "generated" / checkpoint.stem
    if target.exists():
        raise ValueError(f"--out must not hold these samples already, there is {target}")
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        samples = generator(torch.randn(count, settings["noise_size"], generator=rng))
    samples = samples.view(-1, 1, 28, 28) * 2 - 1
    for number, image in enumerate(samples):
        images.write(target / f"{number:02}.png", image[None], columns=1)
    images.write(target / "grid.png", samples, columns=7)
    return target


SWEEP = {"optimizer": tuple(OPTIMIZERS), "unroll_steps": (0, 5)}
HOOKS = {"options": Options(), "arms": arms, "rows": rows}
main = partial(study.main, __doc__, PRESETS, train, report, "gan_mnist", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
