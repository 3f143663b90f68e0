"""The networks of RS-GAN's image experiments: SN-DCGAN, and the ResNets of SN-GAN.

As in the code of Sun, Fang and Schwing 2020 (https://arxiv.org/abs/2011.04926). G has batch
normalisation; D has spectral normalisation and orthogonal weights. D's last layer is a single row
under spectral normalisation, so it has unit norm at every step. The authors normalise it once more
after RpGAN's steps, which has no effect.
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

NOISE = 128
LEAK = 0.1
FULL = {("dcgan", 32): 64, ("dcgan", 48): 64, ("resnet", 32): 256, ("resnet", 48): 64}
WIDTHS = {"regular": 1, "half": 2, "quarter": 4, "bottleneck": 1}


def networks(structure: str, size: int, width: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Return G and D.

    Args:
        structure: "dcgan" or "resnet".
        size: The side of an image, 32 or 48.
        width: "regular", "half" or "quarter" of the channels; "bottleneck": of a ResNet of regular
            width, with half of the channels between the two convolutions of a block.
    """
    if (structure, size) not in FULL:
        known = sorted({side for name, side in FULL if name == structure})
        raise ValueError(f"--image-size must be one of {known} for {structure}, got {size}")
    narrow = 2 if width == "bottleneck" else 1
    if narrow > 1 and structure != "resnet":
        raise ValueError(f"--width bottleneck is of the ResNets, got a preset of {structure}")
    features = FULL[structure, size] // WIDTHS[width]
    if structure == "dcgan":
        return dcgan_generator(features, size), dcgan_discriminator(features, size)
    if size == 32:
        g_channels, d_channels = [features] * 4, [features // 2] * 4
    else:
        g_channels = [features * times for times in (8, 4, 2, 1)]
        d_channels = [features * times for times in (1, 2, 4, 8, 16)]
    return resnet_generator(g_channels, size, narrow), resnet_discriminator(d_channels, narrow)


def dcgan_generator(features: int, size: int) -> nn.Sequential:
    """Return a generator of transposed convolutions."""
    layers = _from_noise(8 * features, size // 8)
    for inputs, outputs in pairwise(features * times for times in (8, 4, 2, 1)):
        up = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        layers += [up, nn.BatchNorm2d(outputs), nn.ReLU()]
    layers += [nn.Conv2d(features, 3, 3, padding=1), nn.Tanh()]
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):  # not the transposed ones, in their code too
            nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(*layers)


def dcgan_discriminator(features: int, size: int) -> nn.Sequential:
    """Return a discriminator of seven convolutions, every second of which halves the size."""
    layers: list[nn.Module] = []
    channels = [3, *(features * times for times in (1, 1, 2, 2, 4, 4, 8))]
    for number, (inputs, outputs) in enumerate(pairwise(channels)):
        halves = number % 2
        conv = nn.Conv2d(inputs, outputs, 3 + halves, stride=1 + halves, padding=1)
        layers += [_spectral(conv), nn.LeakyReLU(LEAK)]
    last = nn.Linear(8 * features * (size // 8) ** 2, 1, bias=False)
    return nn.Sequential(*layers, nn.Flatten(), _spectral(last))


def resnet_generator(channels: list[int], size: int, narrow: int = 1) -> nn.Sequential:
    """Return a generator of three residual blocks, each of which doubles the size."""
    return nn.Sequential(
        *_from_noise(channels[0], size // 8),
        *(_up(inputs, outputs, narrow) for inputs, outputs in pairwise(channels)),
        nn.BatchNorm2d(channels[-1]),
        nn.ReLU(),
        nn.Conv2d(channels[-1], 3, 1),
        nn.Tanh(),
    )


def resnet_discriminator(channels: list[int], narrow: int = 1) -> nn.Sequential:
    """Return a discriminator of residual blocks, each of which halves the size."""
    return nn.Sequential(
        _down(3, channels[0], channels[0] // narrow, first=True),
        *(_down(inputs, outputs, inputs // narrow) for inputs, outputs in pairwise(channels)),
        nn.LeakyReLU(LEAK),
        SumOverPixels(),
        _spectral(nn.Linear(channels[-1], 1, bias=False)),
    )


class Residual(nn.Module):
    """The sum of two branches."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branch(x) + self.shortcut(x)
        return total


class SumOverPixels(nn.Module):
    """Global pooling by sums, as in SN-GAN."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


def _up(inputs: int, outputs: int, narrow: int) -> Residual:
    hidden = outputs // narrow
    branch = nn.Sequential(
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(inputs, hidden, 3, padding=1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, outputs, 3, padding=1),
    )
    upsample = nn.Upsample(scale_factor=2, mode="bilinear")
    return Residual(branch, nn.Sequential(upsample, nn.Conv2d(inputs, outputs, 1)))


def _down(inputs: int, outputs: int, hidden: int, *, first: bool = False) -> Residual:
    """The first block, on pixels, has no activation before it, and pools before its shortcut."""
    branch = [
        nn.LeakyReLU(LEAK),
        _spectral(nn.Conv2d(inputs, hidden, 3, padding=1)),
        nn.LeakyReLU(LEAK),
        _spectral(nn.Conv2d(hidden, outputs, 3, padding=1)),
        nn.AvgPool2d(2),
    ]
    shortcut = [_spectral(nn.Conv2d(inputs, outputs, 1)), nn.AvgPool2d(2)]
    if first:
        branch, shortcut = branch[1:], shortcut[::-1]
    return Residual(nn.Sequential(*branch), nn.Sequential(*shortcut))


def _from_noise(channels: int, start: int) -> list[nn.Module]:
    shape = channels, start, start
    return [nn.Linear(NOISE, channels * start**2), nn.Unflatten(1, shape)]


def _spectral(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    nn.init.orthogonal_(layer.weight)
    return spectral_norm(layer)
