"""The networks of Appendices D and F: transposed convolutions in G, convolutions in D, all 3x3.

The appendices swap the two words. BatchNorm and leaky ReLU follow every layer but the last of each
network; tanh, for pixels in [-1, 1], follows G's.
"""

import torch
from torch import nn

LEAK = 0.3


def generator(
    size: float, rng: torch.Generator, *, noise_size: int = 256, channels: int = 3
) -> nn.Sequential:
    """Return G: 4x4x512, 256, 128, 64 and the image, times the size X where it is not the image."""
    wide, *widths = (_width(size, count) for count in (512, 256, 128, 64))
    layers: list[nn.Module] = [
        nn.Linear(noise_size, 16 * wide, bias=False),
        nn.Unflatten(1, (wide, 4, 4)),
        *_normalised(wide),
    ]
    for before, after in zip([wide, *widths], widths, strict=False):
        layers += [
            nn.ConvTranspose2d(before, after, 3, 2, 1, output_padding=1, bias=False),
            *_normalised(after),
        ]
    layers += [nn.ConvTranspose2d(widths[-1], channels, 3, 1, 1), nn.Tanh()]
    return _initialised(nn.Sequential(*layers), rng)


def discriminator(size: float, rng: torch.Generator, *, channels: int = 3) -> nn.Sequential:
    """Return D: 64, 128 and 256 filters, times the size X, to 4x4, and a logit."""
    widths = [_width(size, count) for count in (64, 128, 256)]
    layers: list[nn.Module] = []
    for before, after in zip([channels, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), *_normalised(after)]
    layers += [nn.Flatten(), nn.Linear(16 * widths[-1], 1)]
    return _initialised(nn.Sequential(*layers), rng)


def _width(size: float, count: int) -> int:
    width = round(size * count)
    if width < 1:
        raise ValueError(f"--size must leave every layer a channel, {size} leaves {count} none")
    return width


def _normalised(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.LeakyReLU(LEAK)]


def _initialised(network: nn.Sequential, rng: torch.Generator) -> nn.Sequential:
    """Draw weights as DCGAN does, N(0, 0.02^2); the paper is silent."""
    network.to(rng.device)
    for module in network:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=0.02, generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
