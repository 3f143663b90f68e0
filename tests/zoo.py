"""Awkward discriminators, each with a batch, an objective and what is special about it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tests.settings import DEVICE
from unroll import R1, R2, GradientPenalty, Minimax, Objective, RelativisticPairing, Wasserstein

Batch = Any
Layer = Callable[[nn.Module], nn.Module]
MINIMAX = Minimax()


@dataclass(frozen=True)
class Animal:
    """A discriminator and how it is fed.

    ``feed`` turns the continuous part of a batch, of shape ``(5, *shape)``, into what D takes.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    feed: Callable[[Tensor], Batch] = lambda x: x
    objective: Objective = MINIMAX
    steps: int = 3
    adam: bool = False  # whether to try it with Adam too

    def make(self) -> nn.Module:
        """Return the discriminator, in float64."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the old weight norm
            return self.build().to(DEVICE, torch.float64)


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


class Attention(nn.Module):
    """Self-attention over a sequence of tokens, in one of several forms."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 1)
        if kind == "raw":
            self.mix: nn.Module = nn.Linear(8, 24)
        elif kind == "encoder":
            self.mix = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        else:
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        if self.kind == "raw":
            query, key, value = (t.unsqueeze(1) for t in self.mix(tokens).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1)
        elif self.kind == "encoder":
            mixed = self.mix(tokens)
        else:
            mixed, _ = self.mix(tokens, tokens, tokens, need_weights=self.kind == "weights")
        output: Tensor = self.head(torch.tanh(mixed).mean(1))
        return output


class Recurrent(nn.Module):
    """A recurrent layer over a sequence."""

    def __init__(self, layer: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(x)[0][:, -1])
        return output


class Conditional(nn.Module):
    """Labels by an embedding that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 3), mlp()
        self.join = nn.Linear(7, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        output: Tensor = self.body(self.join(torch.cat([x, self.embed(label)], 1)))
        return output


class Projection(nn.Module):
    """The projection discriminator (Miyato and Koyama 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head, self.embed = nn.Linear(6, 1), nn.Embedding(7, 6)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        features = self.features(x)
        output: Tensor = self.head(features).squeeze(1) + (self.embed(label) * features).sum(1)
        return output


class TwoScales(nn.Module):
    """A multi-scale PatchGAN: a list of score maps."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 2))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [scale(F.avg_pool2d(x, 2**i)) for i, scale in enumerate(self.scales)]


class Summed:
    """An objective of one's own for a D with many outputs."""

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Sum the hinge-like losses of all maps."""
        pairs = zip(d(fake), d(real), strict=True)
        losses = [F.softplus(f).mean() + F.softplus(-r).mean() for f, r in pairs]
        return torch.stack(losses).sum()

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Sum over the maps."""
        return torch.stack([F.softplus(-f).mean() for f in d(fake)]).sum()


class MinibatchDeviation(nn.Module):
    """The standard deviation over the batch as a feature (Karras et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(4, 5), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.features(x))
        deviation = (features.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(x), 1)
        output: Tensor = self.head(torch.cat([features, deviation], 1))
        return output


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


class Autoencoder(nn.Module):
    """EBGAN's energy, decoded with the encoder's own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        decoded = F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T)
        return -(decoded - x).square().mean(1)


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


class Fourier(nn.Module):
    """A branch on the spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2 * 6 * 4, 1)
        self.gain = nn.Parameter(torch.ones(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x) * self.gain
        output: Tensor = self.head(torch.log1p(spectrum.abs().square()).flatten(1))
        return output


class Resampling(nn.Module):
    """Interpolation and every kind of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = F.max_pool2d(torch.tanh(self.first(x)), 2)
        x = F.pixel_unshuffle(F.avg_pool2d(x, 2)[..., :2, :2], 2)
        output: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return output


class EqualisedRate(nn.Module):
    """A parametrization: the weight is scaled at run time (Karras et al. 2018)."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.7


def _equalised(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", EqualisedRate())
    return layer


def _frozen_backbone() -> nn.Module:
    d = mlp()
    d.get_submodule("0").requires_grad_(False)
    return d


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _labels(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % 3


def _named(x: Tensor) -> dict[str, Tensor]:
    return {"label": _labels(x), "x": x}


def _expanded(x: Tensor) -> Tensor:
    return x[:, :, :1].expand(-1, -1, 6, 6) + x


IMAGE = (2, 6, 6)
TOKENS = (4, 3)
ZOO: dict[str, Animal] = {
    "tanh": Animal(lambda: mlp(), adam=True),
    "in-place ReLU": Animal(lambda: mlp(nn.ReLU(inplace=True), width=24), adam=True),
    "in-place LeakyReLU, conv": Animal(lambda: conv(nn.LeakyReLU(0.2, inplace=True)), IMAGE),
    "in-place SiLU": Animal(lambda: mlp(nn.SiLU(inplace=True))),
    "BatchNorm1d": Animal(lambda: mlp(nn.BatchNorm1d(6)), adam=True),
    "BatchNorm1d, eval": Animal(lambda: evaluated(mlp(nn.BatchNorm1d(6)))),
    "BatchNorm2d": Animal(lambda: conv(nn.BatchNorm2d(4)), IMAGE),
    "BatchNorm2d, eval": Animal(lambda: evaluated(conv(nn.BatchNorm2d(4))), IMAGE),
    "BatchNorm, cumulative": Animal(lambda: mlp(nn.BatchNorm1d(6, momentum=None))),
    "BatchNorm, no statistics": Animal(lambda: mlp(nn.BatchNorm1d(6, track_running_stats=False))),
    "GroupNorm": Animal(lambda: conv(nn.GroupNorm(2, 4)), IMAGE),
    "InstanceNorm2d": Animal(
        lambda: conv(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), IMAGE
    ),
    "LayerNorm": Animal(lambda: mlp(nn.LayerNorm(6)), adam=True),
    "LayerNorm, conv": Animal(lambda: conv(nn.LayerNorm([4, 3, 3])), IMAGE),
    "RMSNorm": Animal(lambda: mlp(nn.RMSNorm(6))),
    "spectral norm": Animal(lambda: both(nn.utils.parametrizations.spectral_norm), steps=5),
    "spectral norm, conv": Animal(
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3, 2)),
            nn.SiLU(),
            nn.Flatten(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(16, 1)),
        ),
        IMAGE,
        steps=5,
        adam=True,
    ),
    "spectral norm, hooks": Animal(lambda: both(nn.utils.spectral_norm), steps=5),
    "weight norm": Animal(lambda: both(nn.utils.parametrizations.weight_norm)),
    "weight norm, one norm": Animal(
        lambda: both(lambda m: nn.utils.parametrizations.weight_norm(m, dim=-1))
    ),
    "weight norm, last dim": Animal(
        lambda: both(lambda m: nn.utils.parametrizations.weight_norm(m, dim=1))
    ),
    "weight norm, hooks": Animal(lambda: both(nn.utils.weight_norm), adam=True),
    "orthogonal": Animal(
        lambda: nn.Sequential(
            nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1)
        )
    ),
    "equalised learning rate": Animal(lambda: both(_equalised)),
    "dropout": Animal(lambda: mlp(nn.Dropout(0.3))),
    "dropout, eval": Animal(lambda: mlp(nn.Dropout(0.3)).eval()),
    "dropout2d": Animal(lambda: conv(nn.Dropout2d(0.3)), IMAGE),
    "attention, weights": Animal(lambda: Attention("weights"), TOKENS),
    "attention, no weights": Animal(lambda: Attention("no weights"), TOKENS, adam=True),
    "attention, raw": Animal(lambda: Attention("raw"), TOKENS),
    "transformer layer": Animal(lambda: Attention("encoder"), TOKENS),
    "transformer layer, eval": Animal(lambda: Attention("encoder").eval(), TOKENS),
    "LSTM": Animal(lambda: Recurrent(nn.LSTM(3, 5, batch_first=True), 5), TOKENS, adam=True),
    "LSTM, bidirectional": Animal(
        lambda: Recurrent(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True), 8), TOKENS
    ),
    "GRU": Animal(lambda: Recurrent(nn.GRU(3, 5, batch_first=True), 5), TOKENS),
    "RNN": Animal(lambda: Recurrent(nn.RNN(3, 5, batch_first=True), 5), TOKENS),
    "conditional, tuple": Animal(Conditional, feed=lambda x: (x, _labels(x)), adam=True),
    "conditional, mapping": Animal(Conditional, feed=_named),
    "projection": Animal(Projection, feed=lambda x: (x, _labels(x))),
    "projection, mapping, R1": Animal(Projection, feed=_named, objective=Minimax() + R1(1.0)),
    "PatchGAN": Animal(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 1)), IMAGE
    ),
    "many outputs": Animal(TwoScales, IMAGE, objective=Summed()),
    "minibatch deviation": Animal(MinibatchDeviation),
    "tied": Animal(Tied, adam=True),
    "autoencoder": Animal(Autoencoder),
    "unused parameters": Animal(Unused, adam=True),
    "frozen backbone": Animal(_frozen_backbone, adam=True),
    "parameter collections": Animal(Collections),
    "changing buffers": Animal(Averaging, adam=True),
    "changing buffers, in place": Animal(Annealed),
    "channels last": Animal(
        lambda: conv(nn.GroupNorm(2, 4)).to(memory_format=torch.channels_last),
        IMAGE,
        feed=_channels_last,
    ),
    "expanded input": Animal(lambda: conv(), IMAGE, feed=_expanded),
    "non-contiguous input": Animal(lambda: conv(), IMAGE, feed=lambda x: x.transpose(2, 3)),
    "spectrum": Animal(Fourier, IMAGE),
    "resampling": Animal(Resampling, IMAGE),
    "R1": Animal(lambda: mlp(), objective=Minimax() + R1(2.0), adam=True),
    "RpGAN + R1 + R2": Animal(
        lambda: mlp(), objective=RelativisticPairing() + R1(1.0) + R2(1.0), adam=True
    ),
    "WGAN-GP": Animal(lambda: mlp(), objective=Wasserstein() + GradientPenalty(1.0)),
    "LayerNorm + R1": Animal(lambda: mlp(nn.LayerNorm(6)), objective=Minimax() + R1(2.0)),
    "LayerNorm, conv + R1": Animal(
        lambda: conv(nn.LayerNorm([4, 3, 3])), IMAGE, objective=Minimax() + R1(2.0)
    ),
    "GroupNorm + R1": Animal(
        lambda: conv(nn.GroupNorm(2, 4)), IMAGE, objective=Minimax() + R1(2.0)
    ),
    "RMSNorm + R1": Animal(lambda: mlp(nn.RMSNorm(6)), objective=Minimax() + R1(2.0)),
    "weight norm + R1": Animal(
        lambda: both(nn.utils.parametrizations.weight_norm), objective=Minimax() + R1(2.0)
    ),
    "spectral norm + R1": Animal(
        lambda: both(nn.utils.parametrizations.spectral_norm), objective=Minimax() + R1(2.0)
    ),
    "attention + R1": Animal(
        lambda: Attention("no weights"), TOKENS, objective=Minimax() + R1(2.0)
    ),
    "BatchNorm, eval + R1": Animal(
        lambda: evaluated(mlp(nn.BatchNorm1d(6))), objective=Minimax() + R1(2.0)
    ),
}  # fmt: skip
