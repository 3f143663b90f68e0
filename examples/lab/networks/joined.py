"""Networks on images of several seeds as one network, which computes what each does alone.

Images are `(seeds, channels, height, width, samples)`, as points are in `lab.seeds`. What is here
measured best on a CPU: G's layers are wide enough for PyTorch's own convolutions, one seed after
the other; the tiny ones of D, differentiated twice, are faster as products of all seeds, and these
can be compiled.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lab.seeds import Linears


class Generators(nn.ModuleList):
    """Generators of images, one a seed."""

    def forward(self, noise: Tensor) -> Tensor:
        """Return the images of noise, `(seeds, samples, features)`."""
        images = torch.stack([one(z) for one, z in zip(self, noise, strict=True)])
        return last(images)


def last(images: Tensor) -> Tensor:
    """Return images `(seeds, samples, ...)` with the samples in the last dimension."""
    return images.movedim(1, -1).contiguous()


def discriminators(networks: Sequence[nn.Sequential]) -> nn.Sequential:
    """Return convolutional discriminators as one, whose logits are `(seeds, 1, samples)`."""
    return nn.Sequential(*[_joined(each) for each in zip(*networks, strict=True)])


class Convolutions(nn.Module):
    """An `nn.Conv2d` of 3x3, padded by 1, for each seed."""

    def __init__(self, each: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        self.stride = each[0].stride[0]
        self.product = _products(each)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the weights with the nine slices of the images that they meet."""
        x = pad(x, (0, 0, 1, 1, 1, 1))
        seeds, channels, height, width, samples = x.shape
        rows, columns = (
            [slice(start, start + size - 2, self.stride) for start in range(3)]
            for size in (height, width)
        )
        slices = torch.stack([x[:, :, row, column] for row in rows for column in columns], 2)
        found = self.product(slices.view(seeds, 9 * channels, -1))
        return found.view(seeds, -1, *slices.shape[3:5], samples)


class Norms(nn.BatchNorm1d):
    """An `nn.BatchNorm2d` for each seed."""

    def __init__(self, each: Sequence[nn.BatchNorm2d]) -> None:
        super().__init__(len(each) * each[0].num_features)
        states = [one.state_dict() for one in each]
        self.load_state_dict(
            {
                name: torch.cat([state[name] for state in states]) if value.ndim else value
                for name, value in states[0].items()  # the number of batches is that of all
            },
            assign=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every channel of every seed."""
        return super().forward(x.reshape(1, self.num_features, -1)).view(x.shape)


def _joined(each: Sequence[Any]) -> nn.Module:
    match each[0]:
        case nn.Conv2d():
            return Convolutions(each)
        case nn.BatchNorm2d():
            return Norms(each)
        case nn.Flatten():
            return nn.Flatten(1, 3)
        case nn.Linear():
            return _products(each)
    layer: nn.Module = each[0]  # without a state
    return layer


def _products(each: Sequence[Any]) -> Linears:
    weight = torch.stack([one.weight.detach().flatten(1) for one in each])
    if each[0].bias is None:
        return Linears(weight)
    return Linears(weight, torch.stack([one.bias.detach() for one in each]).unsqueeze(2))
