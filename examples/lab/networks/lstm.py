"""The networks of Appendix C: an LSTM that draws an image column by column, a convolutional D."""

import torch
from torch import Tensor, nn

SIDE = 28


class Generator(nn.Module):
    """An LSTM whose initial state is the noise, and whose outputs are the columns of an image."""

    def __init__(
        self, noise_size: int, width: int, initial_state: str, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.first = nn.Linear(noise_size, width)
        self.lstm = nn.LSTM(1, width, batch_first=True)
        self.last = nn.Linear(width, SIDE)
        self.initial_state = initial_state
        xavier(self, rng)
        forget = slice(width, 2 * width)  # of the gates i, f, g, o
        self.lstm.bias_ih_l0.data[forget] = 1.0  # nn.LSTM adds two biases: 1 in total

    def forward(self, z: Tensor) -> Tensor:
        """Return images, `(N, 1, 28, 28)` in [-1, 1]."""
        noise = self.first(z).relu().unsqueeze(0)
        nothing = torch.zeros_like(noise)
        hidden = nothing if self.initial_state == "cell" else noise
        cell = nothing if self.initial_state == "hidden" else noise
        columns, _ = self.lstm(z.new_zeros(len(z), SIDE, 1), (hidden, cell))
        return self.last(columns).tanh().mT.unsqueeze(1)


def discriminator(rng: torch.Generator) -> nn.Sequential:
    """Return the convolutional D of Appendix C; kernels of 3x3 as in Appendix D."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.3),
        ]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 1))
    xavier(network, rng)
    return network


def xavier(network: nn.Module, rng: torch.Generator) -> None:
    """Initialise weights as Glorot & Bengio (2010), and biases to zero."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=rng)
        elif "bias" in name:
            nn.init.zeros_(parameter)
