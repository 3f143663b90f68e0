"""Image networks of several seeds as one network, which computes what each computes alone.

Images are `(seeds, channels, height, width, samples)`, like the points of `lab.seeds`. The form is
the fastest that we measured on a CPU. G's layers are wide enough for PyTorch's own convolutions,
one seed after the other. D's tiny layers, differentiated twice, are faster as products over all
seeds, and these can be compiled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lab import seeds


def players(
    rngs: seeds.Generators, build: Callable[[torch.Generator], tuple[nn.Module, nn.Sequential]]
) -> tuple["Generators", nn.Sequential]:
    """Return G and D of all seeds, from functions that build those of one seed."""
    of_g, of_d = zip(*rngs.each(build), strict=True)
    g = Generators(of_g).to(memory_format=torch.channels_last)  # a third faster
    return g, nn.Sequential(*[_joined(each) for each in zip(*of_d, strict=True)])


class Generators(nn.ModuleList):
    """Generators of images, one a seed."""

    def forward(self, noise: Tensor) -> Tensor:
        """Return the images of noise, `(seeds, samples, features)`."""
        return last(torch.stack([one(z) for one, z in zip(self, noise, strict=True)]))


def last(images: Tensor) -> Tensor:
    """Return images `(seeds, samples, ...)` with the samples in the last dimension."""
    return images.movedim(1, -1).contiguous()


class Convolutions(nn.Module):
    """An `nn.Conv2d` of 3x3, padded by 1, for each seed."""

    def __init__(self, each: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        self.stride = each[0].stride[0]
        self.product = _products(each)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the weights with the nine slices of the images that they meet."""
        x = pad(x, (0, 0, 1, 1, 1, 1))
        count, channels, height, width, samples = x.shape
        rows, columns = (
            [slice(start, start + size - 2, self.stride) for start in range(3)]
            for size in (height, width)
        )
        slices = torch.stack([x[:, :, row, column] for row in rows for column in columns], 2)
        found = self.product(slices.view(count, 9 * channels, -1))
        return found.view(count, -1, *slices.shape[3:5], samples)


class Norms(nn.BatchNorm1d):
    """An `nn.BatchNorm2d` for each seed."""

    def __init__(self, each: Sequence[nn.BatchNorm2d]) -> None:
        super().__init__(len(each) * each[0].num_features)
        parts = zip(*(one.state_dict().items() for one in each), strict=True)
        states = {named[0][0]: [value for _, value in named] for named in parts}
        # The number of batches, a scalar, is that of all.
        whole = {n: torch.cat(v) if v[0].ndim else v[0] for n, v in states.items()}
        self.load_state_dict(whole, assign=True)

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


def _products(each: Sequence[Any]) -> seeds.Linears:
    weight = torch.stack([one.weight.detach().flatten(1) for one in each])
    if each[0].bias is None:
        return seeds.Linears(weight)
    return seeds.Linears(weight, torch.stack([one.bias.detach() for one in each]).unsqueeze(2))
