"""Layers with something awkward about them, and small discriminators around them."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

Layer = Callable[[nn.Module], nn.Module]


def mlp(*middle: nn.Module, width: int = 6) -> nn.Module:
    """Return a small D with layers of interest in its middle."""
    return nn.Sequential(nn.Linear(4, width), *middle, nn.Tanh(), nn.Linear(width, 1))


def conv(*middle: nn.Module) -> nn.Module:
    """Return a small convolutional D for (2, 6, 6) with layers of interest in its middle."""
    head = nn.Linear(4 * 9, 1)
    return nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), *middle, nn.SiLU(), nn.Flatten(), head)


def evaluated(d: nn.Module) -> nn.Module:
    """Return D in evaluation mode, with statistics of its own."""
    for buffer in d.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return d.eval()


def both(wrap: Layer) -> nn.Module:
    """Return a D whose linear layers are all wrapped."""
    return nn.Sequential(wrap(nn.Linear(4, 6)), nn.Tanh(), wrap(nn.Linear(6, 1)))


class EqualisedRate(nn.Module):
    """A parametrization: the weight is scaled at run time (Karras et al. 2018)."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.7


def equalised(layer: nn.Module) -> nn.Module:
    """Return the layer with its weight scaled at run time."""
    parametrize.register_parametrization(layer, "weight", EqualisedRate())
    return layer


class Averaging(nn.Module):
    """Buffers that the forward pass changes, by assignment and in place, and uses."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 1)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        output: Tensor = self.head(torch.tanh(hidden)) / self.count.sqrt()
        return output


class Annealed(nn.Module):
    """A buffer that is saved for backward and then changed in place."""

    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("noise", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.noise.mul_(0.9)
        output: Tensor = self.body(x * self.noise) * (1 + self.noise.mean())
        return output


class Remembering(nn.Module):
    """Attributes that the forward pass sets: the last features, a count, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 1)
        self.features: Tensor | None = None
        self.calls, self.history = 0, list[float]()

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.body(x))
        self.calls += 1
        self.history.append(self.features.mean().item())
        output: Tensor = self.head(self.features)
        return output


class CachedWeights(nn.Module):
    """A parametrized layer that is used twice under one cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = equalised(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return torch.tanh(self.layer(torch.tanh(self.layer(x)))).sum(1)


class Noise(nn.Module):
    """Instance noise, from torch's global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class StochasticDepth(nn.Module):
    """A block that is left out at random, by a branch in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if torch.rand(()).item() < 0.6:
                x = x + torch.tanh(block(x))
        return x.sum(1)


class _Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return gradients[0] * 3 * x.square()


class Cubed(nn.Module):
    """A hand-written function whose backward pass can be differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Cubed.apply(x))


class StandardisedConvolution(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019)."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(input, w, self.bias, self.stride, self.padding)


class Blur(nn.Module):
    """Anti-aliased downsampling by a constant kernel that no state dict holds (Zhang 2019)."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (taps[:, None] * taps).expand(channels, 1, 3, 3).clone()
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.kernel, stride=2, groups=x.shape[1])


class Excitation(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, 2), nn.Linear(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3))))))
        return x * gates[:, :, None, None]


class ComplexWeights(nn.Module):
    """A complex layer that stores real and imaginary parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(torch.complex128) @ torch.view_as_complex(self.weight).T
        return torch.log1p(z.real.square() + z.imag.square()).sum(1) - z.imag.sum(1)


class Tied(nn.Module):
    """One tensor under two names and once more by hand; one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = self.twice

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        x = torch.tanh(self.again(torch.tanh(self.twice(x))))
        return (F.linear(x, self.first.weight.T)).sum(1)


class TiedConvolution(nn.Module):
    """A convolutional autoencoder's energy, decoded with the encoder's own kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.encoder(x))
        decoded = F.conv_transpose2d(code, self.encoder.weight, padding=1)
        return -(decoded - x).square().mean((1, 2, 3))


class Unused(nn.Module):
    """A parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = mlp(), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(0.5))  # 0-d

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(x) * self.scale
        return output


class Collections(nn.Module):
    """Parameters in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4) / 2 for _ in range(3)])
        self.biases = nn.ParameterDict({"bias": torch.zeros(4), "gain": torch.ones(4)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight + self.biases["bias"])
        output: Tensor = (x * self.biases["gain"]).sum(1)
        return output
