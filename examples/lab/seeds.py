"""Many seeds trained side by side, as one network of independent ones.

Twenty tiny networks cost nearly the same as one. A batch is `(seeds, features, samples)`. A layer
multiplies every seed's samples by that seed's weights, and the game is the sum of the seeds' games.
Each seed's gradient, and so every step of Adam or SGD, is therefore the same as when trained alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import unroll

Network = Callable[[Any], Any]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
}


class Generators:
    """A generator of random numbers for each seed, with the state of all as one tensor."""

    def __init__(self, seeds: Sequence[int], device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._each = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def normal(self, *shape: int) -> Tensor:
        return self.draw(lambda rng: torch.randn(shape, generator=rng, device=rng.device))

    def draw(self, sample: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Return what `sample` draws for each seed, stacked."""
        return torch.stack(self.each(sample))

    def each(self, make: Callable[[torch.Generator], Any]) -> list[Any]:
        """Return what `make` makes for each seed."""
        return [make(rng) for rng in self._each]

    def get_state(self) -> Tensor:
        return torch.stack([rng.get_state() for rng in self._each])

    def set_state(self, states: Tensor) -> None:
        for rng, state in zip(self._each, states, strict=True):
            rng.set_state(state.clone())


def generators(config: Any) -> Generators:
    """Return the generators of an experiment that has `first_seed`, `seeds` and `device`."""
    return Generators(range(config.first_seed, config.first_seed + config.seeds), config.device)


class Scale(nn.Module):
    """Multiply the input by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Linears(nn.Module):
    """An `nn.Linear` for each seed, of weights `(seeds, outputs, inputs)`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return every seed's weights times its samples."""
        return self.weight @ x if self.bias is None else torch.baddbmm(self.bias, self.weight, x)


def linears(
    inputs: int, outputs: int, rngs: Generators, *, bias: bool = True, gain: float | None = None
) -> Linears:
    """Return new layers, orthogonal if there is a `gain`, otherwise with PyTorch's weights."""

    def uniform(*shape: int) -> Tensor:
        drawn = rngs.draw(lambda rng: torch.rand(*shape, generator=rng, device=rng.device))
        return 1 / math.sqrt(inputs) * (2 * drawn - 1)

    def orthogonal(rng: torch.Generator) -> Tensor:
        weight = torch.empty(outputs, inputs, device=rng.device)
        return nn.init.orthogonal_(weight, gain or 0.0, generator=rng)

    weight = uniform(outputs, inputs) if gain is None else rngs.draw(orthogonal)
    if not bias:
        return Linears(weight)
    zeros = torch.zeros(len(weight), outputs, 1, device=rngs.device)
    return Linears(weight, uniform(outputs, 1) if gain is None else zeros)


def perceptrons(
    sizes: Sequence[int],
    activation: str,
    rngs: Generators,
    *,
    last_bias: bool = True,
    gain: float | None = None,
) -> nn.Sequential:
    """Return a perceptron for each seed, linear at the end; `gain` is that of `linears`."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(sizes), start=2):
        bias = last_bias or number < len(sizes)
        layers += [linears(inputs, outputs, rngs, bias=bias, gain=gain), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class SideBySide:
    """The sum of the games of all seeds; one's losses must be means over logits."""

    game: unroll.Objective
    seeds: int

    def discriminator_loss(self, discriminator: Network, fake: Any, real: Any) -> Tensor:
        return self.seeds * self.game.discriminator_loss(discriminator, fake, real)

    def generator_loss(self, discriminator: Network, fake: Any, real: Any) -> Tensor:
        return self.seeds * self.game.generator_loss(discriminator, fake, real)

    def discriminator_losses(self, discriminator: Network, fake: Tensor, real: Tensor) -> Tensor:
        """Return D's loss of each seed."""
        of_real = discriminator(real)  # first, as games do, for what BatchNorm remembers
        pairs = zip(discriminator(fake), of_real, strict=True)
        return torch.stack([self.game.discriminator_loss(_itself, *logits) for logits in pairs])

    def generator_losses(self, discriminator: Network, fake: Tensor) -> Tensor:
        """Return G's loss of each seed, of a game in which the fakes alone make it."""
        each = discriminator(fake)
        return torch.stack([self.game.generator_loss(_itself, logits, logits) for logits in each])


def _itself(logits: Tensor) -> Tensor:
    return logits


def of_seed(earlier: Sequence[Mapping[str, Any]], seed: int) -> list[Mapping[str, Any]]:
    """Return one seed's metrics in the earlier rows of a run."""
    return [row["each"][seed] for row in earlier]
