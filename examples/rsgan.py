"""RS-GAN on images: the original GAN against RpGAN, without and with looking ahead.

Sun, Fang and Schwing, "Towards a Better Global Loss Landscape of GANs" (NeurIPS 2020,
https://arxiv.org/abs/2011.04926), claim that RpGAN (their RS-GAN), which pairs real and generated
samples, does better than the original JS-GAN, most of all with narrow networks. This script has the
networks and settings of their code, at regular, half and quarter width, with K look-ahead steps of
D in the generator's loss.

    cifar, cifar-resnet, stl10, stl10-resnet   their commands: batches of 64, 100,000 iterations,
                                               learning rates that fall linearly from 50,000 on
    small                                      cifar at quarter width, for a CPU

An iteration ("pair") is one G update, then one D update (five with the ResNets), as in their code.

    python examples/rsgan.py --preset cifar --game JS Rp --unroll-steps 0 1
    python examples/rsgan.py --data-root FOLDER --features CLASSIFIER.pt --record
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from lab import runs, study
from lab.data import image_folder
from lab.data.image_folder import Sampler, subset
from lab.data.pixels import as_bytes, as_floats
from lab.figures.images import report as draw
from lab.metrics import features, image_metrics
from lab.networks.resnets import NOISE, networks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import unroll

GAMES: dict[str, unroll.Objective] = {
    "JS": unroll.NonSaturating(),  # what their vanillaGAN.py trains
    "Rp": unroll.RelativisticPairing(),
}
AT_ONCE = 500  # images normalised as one batch, as in the evaluation of their code
DITHER = 1 / 128  # the authors add uniform noise of one grey level to the real images


@dataclass(frozen=True)
class Config(study.OneModel):
    """One run: the authors' first command, SN-DCGAN on CIFAR-10."""

    game: Literal["JS", "Rp"] = "JS"  # JS: the original GAN; Rp: their RS-GAN
    unroll_steps: int = 0  # K, look-ahead steps of D in G's loss
    structure: Literal["dcgan", "resnet"] = "dcgan"  # of both networks
    width: Literal["regular", "half", "quarter", "bottleneck"] = "regular"  # of both networks
    image_size: int = 32  # 32 or 48
    batch_size: int = 64  # of every update
    generator_learning_rate: float = 5e-4  # Adam's
    discriminator_learning_rate: float = 2e-4  # Adam's
    beta1: float = 0.5  # Adam's
    beta2: float = 0.999  # Adam's
    discriminator_steps: int = 1  # updates of D for each of G
    decay_from: int = 50_000  # pairs after which both rates fall
    decay_until: int = 100_000  # pairs after which they are 0
    ema: float = 0.0  # average G's weights, 0.9999 in their code's option; 0: none
    samples: int = 10_000  # behind every metric
    data: str = ""
    features: str = ""
    evaluate_every: int = 10_000  # pairs
    pairs: int = 100_000  # of an update of G, and those of D that go with it

    @property
    def label(self) -> str:
        return f"{self.game}, K = {self.unroll_steps}"

    @property
    def name(self) -> str:
        name = f"{self.preset}-{self.structure}-{self.width}-{self.game}-K{self.unroll_steps}"
        return f"{name}-seed{self.seed}"

    def rate(self, pair: int) -> float:
        """Return the factor of both learning rates: 1, then a line to 0."""
        left = (self.decay_until - pair) / max(self.decay_until - self.decay_from, 1)
        return min(max(left, 0.0), 1.0)


CIFAR = Config("cifar")
RESNET: dict[str, Any] = {"structure": "resnet", "discriminator_steps": 5}
CIFAR_RESNET = replace(
    CIFAR, preset="cifar-resnet", generator_learning_rate=1.5e-3, beta1=0.0, beta2=0.9, **RESNET
)
STL = replace(CIFAR, preset="stl10", image_size=48)
STL_RESNET = replace(STL, preset="stl10-resnet", generator_learning_rate=1e-3, **RESNET)
LENGTH = {"pairs": 600, "evaluate_every": 100, "samples": 1000}
SMALL = replace(CIFAR, preset="small", width="quarter", batch_size=16, **LENGTH)
PRESETS = {c.preset: c for c in (SMALL, CIFAR, CIFAR_RESNET, STL, STL_RESNET)}


@dataclass(frozen=True)
class Options(study.DataOptions):
    """What measures the images, the data and the runs."""

    features: str | None = None  # behind the metrics: inception, a checkpoint, file.py:name


@torch.no_grad()
def sample(generator: nn.Module, noise: Tensor) -> Tensor:
    """Return images in [-1, 1], normalised over batches, and leave the generator as it was."""
    own = copy.deepcopy(generator).train()
    return torch.cat([own(part) for part in noise.split(AT_ONCE)])


def sampler(checkpoint: Path, device: str = "cpu") -> Sampler:
    """Return a function that makes a checkpoint generator's images, for `evaluate.py`."""
    content = torch.load(checkpoint, map_location=device, weights_only=True)
    config = Config(**content["settings"])
    generator = networks(config.structure, config.image_size, config.width)[0].to(device)
    trained = AveragedModel(generator) if config.ema else generator
    trained.load_state_dict(content["parts"]["ema" if config.ema else "g"])

    def make(count: int, rng: torch.Generator) -> Tensor:
        noise = torch.randn(count, NOISE, generator=rng, device=rng.device)
        return as_bytes(sample(trained, noise))

    return make


@cache
def images(preset: str, root: Path | None, split: str, size: int) -> image_folder.Images:
    """Return the data of a preset, or of a folder."""
    if preset.startswith("stl10") and root is None:
        return image_folder.stl10(size)
    return image_folder.load(root, split=split, size=size)


def train(config: Config, options: Options, line: int) -> None:
    of_data = partial(images, config.preset, options.data_root, size=config.image_size)
    pixels = of_data("train").pixels.to(config.device)
    torch.manual_seed(config.seed)
    rng = torch.Generator(config.device).manual_seed(config.seed)
    generator, discriminator = (
        net.to(config.device) for net in networks(config.structure, config.image_size, config.width)
    )
    betas = config.beta1, config.beta2
    rates = config.generator_learning_rate, config.discriminator_learning_rate
    g_optimizer = torch.optim.Adam(generator.parameters(), rates[0], betas)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), rates[1], betas)
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    parts = {"g": generator, "d": discriminator, "g_adam": g_optimizer, "d_adam": d_optimizer}
    parts |= {"ema": averaged} if config.ema else {}
    game = GAMES[config.game]

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, NOISE, generator=rng, device=rng.device)

    def real(count: int = config.batch_size) -> Tensor:
        chosen = torch.randint(len(pixels), (count,), generator=rng, device=rng.device)
        dither = torch.rand(count, *pixels.shape[1:], generator=rng, device=rng.device)
        return as_floats(pixels[chosen]).add_(dither, alpha=DITHER)

    held_out, held_out_real = noise(config.samples), real(AT_ONCE)

    @cache
    def reference(extractor: features.Extractor) -> features.Embedding:
        return extractor(subset(of_data("test").pixels, config.samples))

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
        shown = as_bytes(fake[:16])
        if options.features is None or pairs == 0:
            return row | dict.fromkeys(image_metrics.METRICS, math.nan), shown
        extractor = features.load(options.features, config.device)
        return row | image_metrics.measure(extractor(as_bytes(fake)), reference(extractor)), shown

    unrolled = unroll.UnrolledGeneratorLoss(discriminator, d_optimizer, game, **config.look_ahead)
    path, run = config.checkpoint(options.out), f"{config.label}, seed {config.seed}"
    for pair in runs.iterate(config, options, line, parts, rng, evaluate):
        for optimizer, rate in zip((g_optimizer, d_optimizer), rates, strict=True):
            optimizer.param_groups[0]["lr"] = config.rate(pair) * rate

        g_loss = unrolled(generator(noise()), real())
        runs.update(g_optimizer, g_loss, f"G at pair {pair} of {run}", path)
        if config.ema:
            averaged.update_parameters(generator)

        for _ in range(config.discriminator_steps):
            d_loss = game.discriminator_loss(discriminator, generator(noise()).detach(), real())
            runs.update(d_optimizer, d_loss, f"D at pair {pair} of {run}", path)


def report(results: study.Results) -> str:
    curves = {"d_loss": "D's loss", "g_loss": "G's loss"} | image_metrics.METRICS
    del curves["kid"]  # it says what FID says
    draw(f"rsgan_{results.first.preset}", results, curves=curves, table=tuple(curves))
    return results.sentence("fid", "has a FID of {} by these features")


def arms(configs: Sequence[Config], options: Options) -> list[Config]:
    if options.record and options.features is None:
        raise ValueError("--record needs --features: a record without metrics says nothing")
    first = configs[0]
    networks(first.structure, first.image_size, first.width)
    data, test = (
        images(first.preset, options.data_root, split, first.image_size)
        for split in image_folder.SPLITS
    )
    apart = "" if not torch.equal(data.pixels, test.pixels) else ", none apart for the metrics"
    facts = {"data": f"{data.name}, {len(data.pixels):,} images{apart}"}
    if options.features:
        facts["features"] = features.load(options.features, options.device).name
    return [
        replace(config, **facts, decay_until=max(config.pairs, config.decay_until))
        for config in configs
    ]


SWEEP = {"unroll_steps": (0, 1), "game": ("JS", "Rp")}
HOOKS = {"options": Options(), "arms": arms}
main = partial(study.main, __doc__, PRESETS, train, report, "rsgan", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
