"""RS-GAN on images: the original GAN against RpGAN, without and with looking ahead.

Sun, Fang and Schwing, "Towards a Better Global Loss Landscape of GANs" (NeurIPS 2020,
https://arxiv.org/abs/2011.04926), claim that RpGAN (their RS-GAN), which couples real and generated
samples, does better than the original JS-GAN, most of all with narrow networks. Here are the
networks and settings of their code, at regular, half and quarter width, with K look-ahead steps of
D in the generator's loss.

    cifar, cifar-resnet, stl10, stl10-resnet   their commands: batches of 64, 100,000 iterations,
                                               learning rates that fall linearly from 50,000 on
    small                                      cifar at quarter width, for a CPU

An iteration ("pair") is one G update, then one D update (five with the ResNets), as in their code.

    python examples/rsgan.py --preset cifar --games JS Rp --unroll-steps 0 1
    python examples/rsgan.py --preset small --data-root FOLDER --features CLASSIFIER.pt --record
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lab import cli, runs
from lab.data import image_folder, stl10
from lab.data.pixels import as_bytes
from lab.figures.images import report
from lab.metrics import features, image_metrics
from lab.metrics.samples import AT_ONCE, Sampler, sample, subset
from lab.networks.resnets import NOISE, WIDTHS, networks
from lab.updates import update
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import unroll

EXPERIMENT = "rsgan"
GAMES: dict[str, unroll.Objective] = {
    "JS": unroll.NonSaturating(),  # what their vanillaGAN.py trains
    "Rp": unroll.RelativisticPairing(),
}
DITHER = 1 / 128  # the authors add uniform noise of one grey level to the real images
SHOWN = 16


@dataclass(frozen=True)
class Config:
    """A run. The defaults are those of the authors' first command: SN-DCGAN on CIFAR-10."""

    preset: str = "cifar"
    game: str = "JS"
    unroll_steps: int = 0
    structure: str = "dcgan"
    width: str = "regular"
    image_size: int = 32
    batch_size: int = 64
    generator_lr: float = 5e-4
    discriminator_lr: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    discriminator_steps: int = 1
    decay_from: int = 50_000
    decay_until: int = 100_000
    ema: float = 0.0  # of G's weights, 0.9999 in their code's option; 0: none
    samples: int = 10_000
    data: str = ""
    features: str = ""
    evaluate_every: int = 10_000
    seed: int = 0
    device: str = "cpu"
    pairs: int = 100_000

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        cli.check(self, pairs="iterations")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema must be at least 0 and less than 1, got {self.ema}")

    @property
    def label(self) -> str:
        """Return the name of the setting in figures."""
        return f"{self.game}, K = {self.unroll_steps}"

    def checkpoint(self, folder: Path) -> Path:
        """Return where the run is kept."""
        name = f"{self.preset}-{self.structure}-{self.width}-{self.game}-K{self.unroll_steps}"
        return folder / "checkpoints" / f"{name}-seed{self.seed}.pt"

    def rate(self, pair: int) -> float:
        """Return the factor of both learning rates: 1, then a line to 0."""
        left = (self.decay_until - pair) / max(self.decay_until - self.decay_from, 1)
        return min(max(left, 0.0), 1.0)


RESNET: dict[str, Any] = {"structure": "resnet", "discriminator_steps": 5}
CIFAR = Config()
CIFAR_RESNET = replace(
    CIFAR, preset="cifar-resnet", generator_lr=1.5e-3, beta1=0.0, beta2=0.9, **RESNET
)
STL = replace(CIFAR, preset="stl10", image_size=48)
STL_RESNET = replace(STL, preset="stl10-resnet", generator_lr=1e-3, **RESNET)
LENGTH = {"pairs": 600, "evaluate_every": 100, "samples": 1000}
SMALL = replace(CIFAR, preset="small", width="quarter", batch_size=16, **LENGTH)
PRESETS = {c.preset: c for c in (CIFAR, CIFAR_RESNET, STL, STL_RESNET, SMALL)}


def sampler(checkpoint: Path, device: str = "cpu") -> Sampler:
    """Return what makes images as a checkpoint's generator does: for `evaluate.py`."""
    content = torch.load(checkpoint, map_location=device, weights_only=True)
    config = Config(**content["settings"])
    generator = networks(config.structure, config.image_size, config.width)[0].to(device)
    trained = AveragedModel(generator) if config.ema else generator
    trained.load_state_dict(content["parts"]["ema" if config.ema else "g"])

    def make(count: int, rng: torch.Generator) -> Tensor:
        return as_bytes(
            sample(trained, torch.randn(count, NOISE, generator=rng, device=rng.device))
        )

    return make


@cache
def images(preset: str, root: Path | None, split: str, size: int) -> image_folder.Images:
    """Return the data of a preset, or of a folder."""
    if preset.startswith("stl10") and root is None:
        return stl10.load(size)
    return image_folder.load(root, split=split, size=size)


def train(
    config: Config, line: int, *, folder: Path, resume: bool, root: Path | None, network: str | None
) -> Config:
    """Train one GAN; what comes of it is in its checkpoint."""
    torch.set_num_threads(1)
    pixels = images(config.preset, root, "train", config.image_size).pixels.to(config.device)
    torch.manual_seed(config.seed)
    rng = torch.Generator(config.device).manual_seed(config.seed)
    generator, discriminator = (
        net.to(config.device) for net in networks(config.structure, config.image_size, config.width)
    )
    betas = config.beta1, config.beta2
    g_optimizer = torch.optim.Adam(generator.parameters(), config.generator_lr, betas)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), config.discriminator_lr, betas)
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    parts: dict[str, runs.Stateful] = {"g": generator, "d": discriminator}
    parts |= {"g_adam": g_optimizer, "d_adam": d_optimizer} | (
        {"ema": averaged} if config.ema else {}
    )
    game = GAMES[config.game]

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, NOISE, generator=rng, device=rng.device)

    def real(count: int = config.batch_size) -> Tensor:
        chosen = torch.randint(len(pixels), (count,), generator=rng, device=rng.device)
        dither = torch.rand(count, *pixels.shape[1:], generator=rng, device=rng.device)
        return image_folder.batch(pixels, chosen).add_(dither, alpha=DITHER)

    held_out, held_out_real = noise(config.samples), real(AT_ONCE)

    @cache
    def reference(extractor: features.Extractor) -> features.Embedding:
        test = images(config.preset, root, "test", config.image_size).pixels
        return extractor(subset(test, config.samples))

    @torch.no_grad()
    def evaluate(pairs: int, _: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        fake = sample(averaged if config.ema else generator, held_out)
        discriminator.eval()  # its power iteration stands still
        sides = fake[: len(held_out_real)], held_out_real[: len(fake)]
        row: dict[str, Any] = {
            "player_updates": pairs * (1 + config.discriminator_steps),
            "d_loss": game.discriminator_loss(discriminator, *sides).item(),
            "g_loss": game.generator_loss(discriminator, *sides).item(),
        }
        discriminator.train()
        if network is None or pairs == 0:
            return row | dict.fromkeys(image_metrics.METRICS, math.nan), as_bytes(fake[:SHOWN])
        extractor = features.load(network, config.device)
        found = image_metrics.measure(extractor(as_bytes(fake)), reference(extractor))
        return row | found, as_bytes(fake[:SHOWN])

    path, run = config.checkpoint(folder), f"{config.label}, seed {config.seed}"
    iterations = runs.iterate(
        path,
        asdict(config),
        parts,
        rng,
        evaluate,
        length=config.pairs,
        every=config.evaluate_every,
        resume=resume,
        bar={"desc": run, "position": line, "unit": "pair"},
    )
    unrolled = unroll.UnrolledGeneratorLoss(
        discriminator, d_optimizer, game, unroll_steps=config.unroll_steps
    )
    for pair in iterations:
        g_optimizer.param_groups[0]["lr"] = config.rate(pair) * config.generator_lr
        d_optimizer.param_groups[0]["lr"] = config.rate(pair) * config.discriminator_lr

        g_loss = unrolled(generator(noise()), real())
        update(g_optimizer, g_loss, f"G at pair {pair} of {run}", path)
        if config.ema:
            averaged.update_parameters(generator)

        for _ in range(config.discriminator_steps):
            d_loss = game.discriminator_loss(discriminator, generator(noise()).detach(), real())
            update(d_optimizer, d_loss, f"D at pair {pair} of {run}", path)
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of a finished run."""
    row = {"experiment": EXPERIMENT} | asdict(config) | log["history"][-1]
    return [row | log["provenance"]]


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    add("--games", nargs="+", choices=GAMES, default=["JS", "Rp"], help="default: JS Rp")
    cli.add_unroll_steps(add, 0, 1)
    add = parser.add_argument_group("the experiment").add_argument
    add("--preset", choices=PRESETS, default="small", help="default: small")
    add("--width", choices=WIDTHS, help="of the networks (default: the preset's)")
    add("--image-size", type=cli.positive, metavar="SIDE", help="32 or 48")
    add(
        "--data-root",
        type=Path,
        metavar="FOLDER",
        help="images, in train and test or not: metrics are against test, or else all "
        "(default: the preset's data, by torchvision)",
    )
    add(
        "--features",
        metavar="NETWORK",
        help="behind the metrics, as in evaluate.py: inception, or a checkpoint of "
        "image_classifier.py (default: no metrics)",
    )
    add("--samples", type=cli.positive, metavar="N", help="behind every metric")
    add("--batch-size", type=cli.positive, metavar="N", help="default: the preset's")
    add("--ema", type=float, metavar="BETA", help="average G's weights, 0.9999 in their code")
    cli.add_iterations(add, "of updates of G, and those of D that go with one")
    add("--evaluate-every", type=cli.positive, metavar="PAIRS", help="default: the preset's")
    cli.add_run_flags(parser, EXPERIMENT, figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    base = cli.chosen(given, PRESETS)
    networks(base.structure, base.image_size, base.width)
    data, test = (
        images(base.preset, given.get("data_root"), split, base.image_size)
        for split in image_folder.SPLITS
    )
    apart = "" if not torch.equal(data.pixels, test.pixels) else ", none apart for the metrics"
    behind = features.load(base.features, base.device).name if base.features else ""
    base = replace(
        base,
        data=f"{data.name}, {len(data.pixels):,} images{apart}",
        features=behind,
        decay_until=max(base.pairs, base.decay_until),
    )
    return [
        replace(base, game=game, unroll_steps=k, seed=base.seed + number)
        for number in range(given["seeds"])
        for k in given["steps"]
        for game in given["games"]
    ]


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    if args.record is not None and args.features is None:
        parser.error("--record needs --features: a record without metrics says nothing")
    task = partial(train, root=args.data_root, network=args.features)
    configs = cli.carry_out(parser, args, build, task, record_rows, keep=True)
    panels = {"d_loss": "D's loss", "g_loss": "G's loss"} | image_metrics.METRICS
    del panels["kid"]  # it says what FID says
    report(args, configs, f"{EXPERIMENT}_{args.preset}", panels)


if __name__ == "__main__":
    main()
