"""The networks of the benchmark, written so that PyTorch and JAX can both build them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

import unroll

Layer = tuple[str | int, ...]  # a name and its sizes: what jax_worker.py reads, too

BETAS, EPS, LR = (0.5, 0.999), 1e-8, 1e-4  # D's Adam
EPS_ROOT = 1e-16  # where a peer's Adam would give NaN without it
STEPS = 10_000  # that D has taken: at Adam's first, gradients in float32 are mostly round-off
OBJECTIVE = unroll.Minimax()


def dense(activation: str, *widths: int) -> tuple[Layer, ...]:
    """Return a multi-layer perceptron without an activation at its end."""
    layers: list[Layer] = []
    for inputs, outputs in pairwise(widths):
        layers += [("linear", inputs, outputs), (activation,)]
    return tuple(layers[:-1])


def images(latent: int, width: int) -> tuple[Layer, ...]:
    """Return DCGAN's generator of 3x32x32, ``width`` channels wide at 4x4."""
    layers: list[Layer] = [("linear", latent, width * 4 * 4), ("unflatten", width, 4, 4)]
    for before in (width, width // 2):
        layers += [("batch_norm", before), ("relu",), ("transposed", before, before // 2, 4, 2, 1)]
    last = width // 4
    return (*layers, ("batch_norm", last), ("relu",), ("transposed", last, 3, 4, 2, 1), ("tanh",))


@dataclass(frozen=True)
class Networks:
    """A generator, a discriminator and what they are fed."""

    generator: tuple[Layer, ...]
    discriminator: tuple[Layer, ...]
    latent: int
    sample: tuple[int, ...]
    batch_size: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a batch of noise and of one of data."""
        return (self.batch_size, self.latent), (self.batch_size, *self.sample)


_PLANAR = dense("relu", 256, 128, 128, 2)
_IMAGES = images(100, 256)
_CONV: tuple[Layer, ...] = (
    ("conv", 3, 64, 3, 2, 1),
    ("leaky_relu",),
    ("conv", 64, 128, 3, 2, 1),
    ("leaky_relu",),
    ("conv", 128, 256, 3, 2, 1),
    ("leaky_relu",),
    ("flatten",),
    ("linear", 256 * 4 * 4, 1),
)
_DCGAN: tuple[Layer, ...] = (
    ("conv", 3, 64, 4, 2, 1),
    ("leaky_relu",),
    ("conv", 64, 128, 4, 2, 1),
    ("batch_norm", 128),
    ("leaky_relu",),
    ("conv", 128, 256, 4, 2, 1),
    ("batch_norm", 256),
    ("leaky_relu",),
    ("conv", 256, 1, 4, 1, 0),
    ("flatten",),
)
_STACKED: tuple[Layer, ...] = (
    ("unbiased_conv", 3, 2, 3, 2, 1),
    ("batch_norm", 2),
    ("leaky_relu",),
    ("unbiased_conv", 2, 4, 3, 2, 1),
    ("batch_norm", 4),
    ("leaky_relu",),
    ("unbiased_conv", 4, 8, 3, 2, 1),
    ("batch_norm", 8),
    ("leaky_relu",),
    ("flatten",),
    ("linear", 8 * 4 * 4, 1),
)
_TINY_GENERATOR: tuple[Layer, ...] = (
    ("linear", 5, 32),
    ("unflatten", 8, 2, 2),
    ("batch_norm", 8),
    ("relu",),
    ("transposed", 8, 3, 4, 2, 1),
    ("tanh",),
)
_TINY_DISCRIMINATOR: tuple[Layer, ...] = (
    ("conv", 3, 3, 3, 1, 1),
    ("unbiased_conv", 3, 4, 4, 2, 1),
    ("batch_norm", 4),
    ("leaky_relu",),
    ("flatten",),
    *dense("tanh", 16, 8, 1),
)

NETWORKS = {
    "paper": Networks(_PLANAR, dense("relu", 2, 128, 1), 256, (2,), 512),
    "wide": Networks(_PLANAR, dense("tanh", 2, 128, 128, 1), 256, (2,), 512),
    "conv": Networks(_IMAGES, _CONV, 100, (3, 32, 32), 64),
    "dcgan32": Networks(_IMAGES, _DCGAN, 100, (3, 32, 32), 64),
    "stacked": Networks(images(256, 64), _STACKED, 256, (3, 32, 32), 16),
    # of the tests only: every kind of layer, small
    "tiny": Networks(_TINY_GENERATOR, _TINY_DISCRIMINATOR, 5, (3, 4, 4), 6),
}


def module(layer: Layer) -> nn.Module:
    """Return a layer as PyTorch has it."""
    name, *sizes = layer
    kinds: dict[str | int, Callable[..., nn.Module]] = {
        "linear": nn.Linear,
        "conv": nn.Conv2d,
        "unbiased_conv": partial(nn.Conv2d, bias=False),
        "transposed": nn.ConvTranspose2d,
        "batch_norm": nn.BatchNorm2d,
        "relu": nn.ReLU,
        "leaky_relu": partial(nn.LeakyReLU, 0.2),
        "tanh": nn.Tanh,
        "flatten": nn.Flatten,
        "unflatten": lambda *sizes: nn.Unflatten(1, sizes),
    }
    return kinds[name](*sizes)


@dataclass
class Game:
    """Networks with their weights, and one batch."""

    networks: Networks
    generator: nn.Sequential
    discriminator: nn.Sequential
    z: Tensor
    real: Tensor
    moments: tuple[list[Tensor], list[Tensor]]  # of D's Adam, after STEPS steps


def game(networks: Networks, device: str = "cpu") -> Game:
    """Return the same game at every call, on any device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        g, d = (
            nn.Sequential(*map(module, layers))
            for layers in (networks.generator, networks.discriminator)
        )
        noise, data = networks.shapes
        batches = [(torch.randn(noise), torch.randn(data)) for _ in range(9)]
        seen = []
        for z, real in batches[1:]:
            loss = OBJECTIVE.discriminator_loss(d, g(z).detach(), real)
            seen.append(torch.autograd.grad(loss, tuple(d.parameters())))
    moments = (
        [torch.stack(gradients).mean(0) for gradients in zip(*seen, strict=True)],
        [torch.stack(gradients).square().mean(0) for gradients in zip(*seen, strict=True)],
    )
    first, second = ([t.to(device) for t in moment] for moment in moments)
    z, real = (t.to(device) for t in batches[0])
    return Game(networks, g.to(device), d.to(device), z, real, (first, second))
