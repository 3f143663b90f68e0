"""The small networks of the toy experiments."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
}


class Scale(nn.Module):
    """Multiply the input by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled input."""
        return self.factor * x


def perceptron(
    sizes: Sequence[int], activation: str, *, gain: float, rng: torch.Generator
) -> nn.Sequential:
    """Return fully connected layers with orthogonal weights and zero biases, linear at the end."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        linear = nn.Linear(inputs, outputs, device=rng.device)
        nn.init.orthogonal_(linear.weight, gain, generator=rng)
        nn.init.zeros_(linear.bias)
        layers += [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])
