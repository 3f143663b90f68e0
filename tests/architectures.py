"""Generators and discriminators from the papers, at 32x32 and of any width."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from tests.settings import DEVICE
from unroll import (
    R1,
    R2,
    Criterion,
    Hinge,
    LeastSquares,
    Objective,
    RelativisticPairing,
)

CLASSES = 10
NOISE = 16


def _small_weights(network: nn.Module) -> nn.Module:
    """DCGAN's and pix2pix's initialisation: weights N(0, 0.02)."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
    return network


def dcgan_discriminator(width: int) -> nn.Module:
    """Radford et al. 2016: strided convolutions, BatchNorm but in the first layer, LeakyReLU."""
    channels = [3, width, 2 * width, 4 * width]
    layers: list[nn.Module] = []
    for i, (into, out) in enumerate(pairwise(channels)):
        layers.append(nn.Conv2d(into, out, 4, 2, 1, bias=i == 0))
        layers += [nn.BatchNorm2d(out)] if i else []
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    return _small_weights(nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4), nn.Flatten(0)))


def dcgan_generator(width: int) -> nn.Module:
    """Radford et al. 2016: transposed convolutions, BatchNorm, ReLU, tanh at the end."""
    channels = [4 * width, 2 * width, width]
    layers: list[nn.Module] = [
        nn.Unflatten(1, (NOISE, 1, 1)), nn.ConvTranspose2d(NOISE, channels[0], 4, bias=False)
    ]  # fmt: skip
    for into, out in pairwise(channels):
        layers += [nn.BatchNorm2d(into), nn.ReLU(inplace=True)]
        layers.append(nn.ConvTranspose2d(into, out, 4, 2, 1, bias=False))
    last = nn.ConvTranspose2d(width, 3, 4, 2, 1)
    return _small_weights(
        nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(inplace=True), last, nn.Tanh())
    )


class SNBlock(nn.Module):
    """A residual block of SNGAN's discriminator (Miyato et al. 2018, Fig. 8)."""

    def __init__(self, into: int, out: int, *, first: bool = False, down: bool = False) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.conv1 = spectral_norm(nn.Conv2d(into, out, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(out, out, 3, padding=1))
        learned = first or down or into != out
        self.shortcut = spectral_norm(nn.Conv2d(into, out, 1)) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.first:  # the "optimised" block pools before its shortcut
            side: Tensor = self.shortcut(F.avg_pool2d(x, 2))
            return F.avg_pool2d(h, 2) + side
        h = h + self.shortcut(x)
        return F.avg_pool2d(h, 2) if self.down else h


class SNGANDiscriminator(nn.Module):
    """Miyato et al. 2018, Table 4, and with ``classes`` the projection (Miyato and Koyama 2018)."""

    def __init__(self, width: int, classes: int = 0) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            SNBlock(3, width, first=True), SNBlock(width, width, down=True),
            SNBlock(width, width), SNBlock(width, width),
        )  # fmt: skip
        self.head = spectral_norm(nn.Linear(width, 1))
        self.embed = spectral_norm(nn.Embedding(classes, width)) if classes else None

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        features = F.relu(self.blocks(x)).sum((2, 3))
        scores: Tensor = self.head(features).squeeze(1)
        return scores if self.embed is None else scores + (self.embed(label) * features).sum(1)


class ConditionalBatchNorm(nn.Module):
    """BatchNorm with a gain and a bias for each class."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.affine = nn.Embedding(classes, 2 * channels)
        nn.init.zeros_(self.affine.weight)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gain, bias = self.affine(label)[:, :, None, None].chunk(2, 1)
        output: Tensor = self.norm(x) * (1 + gain) + bias
        return output


class UpBlock(nn.Module):
    """A residual block of SNGAN's generator: upsampling before its first convolution."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (ConditionalBatchNorm(channels, classes) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.shortcut = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, label)), scale_factor=2.0))
        h = self.conv2(F.relu(self.norm2(h, label)))
        output: Tensor = h + self.shortcut(F.interpolate(x, scale_factor=2.0))
        return output


class SNGANGenerator(nn.Module):
    """Miyato et al. 2018, Table 4; without labels all samples are of one class."""

    def __init__(self, width: int, classes: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(NOISE, 16 * width)
        self.blocks = nn.ModuleList(UpBlock(width, classes) for _ in range(3))
        self.norm, self.last = nn.BatchNorm2d(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        label = torch.zeros(len(z), dtype=torch.long, device=z.device) if label is None else label
        h = self.first(z).view(len(z), -1, 4, 4)
        for block in self.blocks:
            h = block(h, label)
        return torch.tanh(self.last(F.relu(self.norm(h))))


class PatchGAN(nn.Module):
    """Isola et al. 2017: C64-C128-C256 and scores of overlapping patches, of pairs of pictures.

    The receptive field is 34x34, one strided layer less than the 70x70 of 256x256 pictures.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(into: int, out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(into, out, 4, stride, 1)
            return [conv, nn.InstanceNorm2d(out), nn.LeakyReLU(0.2, inplace=True)]

        self.body = nn.Sequential(
            nn.Conv2d(6, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True),
            *block(width, 2 * width, 2), *block(2 * width, 4 * width, 1),
            nn.Conv2d(4 * width, 1, 4, 1, 1),
        )  # fmt: skip
        _small_weights(self)

    def forward(self, condition: Tensor, x: Tensor) -> Tensor:
        output: Tensor = self.body(torch.cat([condition, x], 1))
        return output


class Translator(nn.Module):
    """A small U-Net from pictures to pictures (Isola et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, width, 4, 2, 1), nn.Conv2d(width, 2 * width, 4, 2, 1)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.up2 = nn.ConvTranspose2d(2 * width, 3, 4, 2, 1)
        self.norm, self.dropout = nn.InstanceNorm2d(width), nn.Dropout(0.5)
        _small_weights(self)

    def forward(self, condition: Tensor) -> Tensor:
        skip = F.leaky_relu(self.down1(condition), 0.2)
        h = self.dropout(self.norm(self.up1(F.relu(self.down2(skip)))))
        return torch.tanh(self.up2(F.relu(torch.cat([h, skip], 1))))


class R3Block(nn.Module):
    """R3GAN's residual block (Huang et al. 2024): grouped convolution, no norm, Fix-up scaling."""

    def __init__(self, channels: int, groups: int, blocks: int) -> None:
        super().__init__()
        inner = 2 * channels  # an inverted bottleneck
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bias1, self.bias2 = (nn.Parameter(torch.zeros(inner, 1, 1)) for _ in range(2))
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, 0.2)
            conv.weight.data.mul_(blocks**-0.25)
        nn.init.zeros_(self.conv3.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(x) + self.bias1, 0.2)
        h = F.leaky_relu(self.conv2(h) + self.bias2, 0.2)
        output: Tensor = x + self.conv3(h)
        return output


class Resample(nn.Module):
    """Bilinear resampling, and a 1x1 convolution where the width changes."""

    def __init__(self, into: int, out: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.width = nn.Conv2d(into, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        resized = F.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=False)
        output: Tensor = self.width(resized)
        return output


def r3gan_discriminator(width: int) -> nn.Module:
    """Huang et al. 2024: three stages from 32x32 to 4x4, and a depthwise basis of 4x4."""
    last = nn.Sequential(
        nn.Conv2d(4 * width, 4 * width, 4, groups=4 * width, bias=False), nn.Flatten(),
        nn.Linear(4 * width, 1, bias=False), nn.Flatten(0),
    )  # fmt: skip
    stages: list[nn.Module] = [nn.Conv2d(3, width, 1), R3Block(width, width // 2, 4)]
    for i in range(3):
        into, out = width * min(2**i, 4), width * min(2 ** (i + 1), 4)
        stages += [Resample(into, out, 0.5), R3Block(out, out // 2, 4)]
    return nn.Sequential(*stages, last)


def r3gan_generator(width: int) -> nn.Module:
    """Huang et al. 2024: the discriminator's mirror image."""
    stages: list[nn.Module] = [nn.Linear(NOISE, 4 * width * 16), nn.Unflatten(1, (4 * width, 4, 4))]
    stages.append(R3Block(4 * width, 2 * width, 4))
    for i in (2, 1, 0):
        into, out = width * min(2 ** (i + 1), 4), width * min(2**i, 4)
        stages += [Resample(into, out, 2.0), R3Block(out, out // 2, 4)]
    return nn.Sequential(*stages, nn.Conv2d(width, 3, 1))


def _noise(samples: int) -> tuple[Tensor, ...]:
    return (torch.randn(samples, NOISE, device=DEVICE),)


def _noise_and_labels(samples: int) -> tuple[Tensor, ...]:
    labels = torch.randint(CLASSES, (samples,), device=DEVICE)
    return *_noise(samples), labels


def pictures(samples: int) -> tuple[Tensor, ...]:
    """Return pictures in [-1, 1], of waves that differ in direction, length and colour."""
    grid = torch.linspace(-1, 1, 32, device=DEVICE)
    a, b, phase = 4 * torch.randn(3, samples, 3, 1, 1, device=DEVICE)
    waves = torch.sin(a * grid[:, None] + b * grid + phase)
    return ((0.9 * waves + 0.1 * torch.randn_like(waves)).clamp(-1, 1),)


@dataclass(frozen=True)
class Architecture:
    """A GAN as a paper trains it.

    ``draw`` returns what the generator takes; ``feed`` makes of a picture, and of what it was (or
    would have been) generated from, what D takes.
    """

    generator: Callable[[int], nn.Module]
    discriminator: Callable[[int], nn.Module]
    objective: Objective
    lr: float
    betas: tuple[float, float]
    width: int  # at which one core checks a gradient within seconds; the papers' are 64 to 768
    draw: Callable[[int], tuple[Tensor, ...]] = _noise
    feed: Callable[..., Any] = lambda x, *_: x

    def adam(self, network: nn.Module) -> torch.optim.Adam:
        """Return the paper's optimizer."""
        return torch.optim.Adam(network.parameters(), lr=self.lr, betas=self.betas)


ARCHITECTURES = {
    "DCGAN": Architecture(
        dcgan_generator, dcgan_discriminator, Criterion(nn.BCEWithLogitsLoss()),
        2e-4, (0.5, 0.999), 4,
    ),
    "SNGAN": Architecture(SNGANGenerator, SNGANDiscriminator, Hinge(), 2e-4, (0.0, 0.9), 4),
    "PatchGAN": Architecture(
        Translator, PatchGAN, LeastSquares(), 2e-4, (0.5, 0.999), 4, pictures,
        lambda x, condition: (condition, x),
    ),
    "projection": Architecture(
        lambda width: SNGANGenerator(width, CLASSES),
        lambda width: SNGANDiscriminator(width, CLASSES),
        Hinge(), 2e-4, (0.0, 0.9), 4, _noise_and_labels, lambda x, _, label: (x, label),
    ),
    "R3GAN": Architecture(
        r3gan_generator, r3gan_discriminator, RelativisticPairing() + R1(1.0) + R2(1.0),
        2e-4, (0.0, 0.99), 2,
    ),
}  # fmt: skip
