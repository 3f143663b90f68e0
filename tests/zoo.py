"""Awkward discriminators, each with a batch, an objective and what is special about it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from tests import zoo_networks as nets
from tests.settings import DEVICE
from tests.zoo_layers import (
    Annealed,
    Averaging,
    Blur,
    CachedWeights,
    Collections,
    ComplexWeights,
    Cubed,
    Excitation,
    Noise,
    Remembering,
    StandardisedConvolution,
    StochasticDepth,
    Tied,
    TiedConvolution,
    Unused,
    both,
    conv,
    equalised,
    evaluated,
    mlp,
)
from tests.zoo_networks import Attention, Recurrent
from tests.zoo_networks import Conditional as Conditional
from tests.zoo_networks import Projection as Projection
from unroll import R1, R2, GradientPenalty, Minimax, Objective, RelativisticPairing, Wasserstein

Batch = Any
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


def _frozen_backbone() -> nn.Module:
    d = mlp()
    d.get_submodule("0").requires_grad_(False)
    return d


def _recurrent_weight(wrap: Callable[..., nn.Module]) -> nn.LSTM:
    layer = nn.LSTM(3, 5, batch_first=True)
    wrap(layer, "weight_hh_l0")
    return layer


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _labels(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % 3


def labelled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return samples and labels."""
    return x, _labels(x)


def _named(x: Tensor) -> dict[str, Tensor]:
    return {"label": _labels(x), "x": x}


def _expanded(x: Tensor) -> Tensor:
    return x[:, :, :1].expand(-1, -1, 6, 6) + x


def _pruned() -> nn.Module:
    d = mlp()
    layer = d.get_submodule("0")
    prune.l1_unstructured(layer, "weight", 0.4)
    return d


def _hooked() -> nn.Module:
    """Hooks that change what goes in and what comes out, and one that reads gradients."""
    d = mlp()
    d.get_submodule("0").register_forward_pre_hook(lambda _, args: (torch.sin(args[0]),))
    d.get_submodule("1").register_forward_hook(lambda _, __, output: 1.5 * output + 0.1)
    d.get_submodule("2").register_full_backward_hook(lambda *_: None)
    return d


def _lazy() -> nn.Module:
    d = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1))
    d(torch.zeros(2, 4))
    return d


def compiled(d: nn.Module) -> nn.Module:
    """Return D behind ``torch.compile``, without the wait for a real backend."""
    return cast(nn.Module, torch.compile(d, backend="aot_eager"))


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
    "spectral norm": Animal(lambda: both(parametrizations.spectral_norm), steps=5),
    "spectral norm, conv": Animal(
        lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.Conv2d(2, 4, 3, 2)),
            nn.SiLU(),
            nn.Flatten(),
            parametrizations.spectral_norm(nn.Linear(16, 1)),
        ),
        IMAGE,
        steps=5,
        adam=True,
    ),
    "spectral norm, hooks": Animal(lambda: both(nn.utils.spectral_norm), steps=5),
    "weight norm": Animal(lambda: both(parametrizations.weight_norm)),
    "weight norm, one norm": Animal(
        lambda: both(lambda m: parametrizations.weight_norm(m, dim=-1))
    ),
    "weight norm, last dim": Animal(
        # Of the head, each column would be one number, whose norm has no slope to speak of.
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(4, 6), dim=1), nn.Tanh(), nn.Linear(6, 1)
        )
    ),
    "weight norm, hooks": Animal(lambda: both(nn.utils.weight_norm), adam=True),
    "orthogonal": Animal(
        lambda: nn.Sequential(
            parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1)
        )
    ),
    "equalised learning rate": Animal(lambda: both(equalised)),
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
    "conditional, tuple": Animal(Conditional, feed=labelled, adam=True),
    "conditional, mapping": Animal(Conditional, feed=_named),
    "projection": Animal(Projection, feed=labelled),
    "projection, mapping, R1": Animal(Projection, feed=_named, objective=Minimax() + R1(1.0)),
    "PatchGAN": Animal(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 1)), IMAGE
    ),
    "many outputs": Animal(nets.TwoScales, IMAGE, objective=nets.Summed()),
    "minibatch deviation": Animal(nets.MinibatchDeviation),
    "tied": Animal(Tied, adam=True),
    "autoencoder": Animal(nets.Autoencoder),
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
    "spectrum": Animal(nets.Fourier, IMAGE),
    "short-time spectrum": Animal(nets.Sound, (16,)),
    "resampling": Animal(nets.Resampling, IMAGE),
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
        lambda: both(parametrizations.weight_norm), objective=Minimax() + R1(2.0)
    ),
    "spectral norm + R1": Animal(
        lambda: both(parametrizations.spectral_norm), objective=Minimax() + R1(2.0)
    ),
    "attention + R1": Animal(
        lambda: Attention("no weights"), TOKENS, objective=Minimax() + R1(2.0)
    ),
    "BatchNorm, eval + R1": Animal(
        lambda: evaluated(mlp(nn.BatchNorm1d(6))), objective=Minimax() + R1(2.0)
    ),
    # Activations
    "smooth activations": Animal(
        lambda: mlp(
            nn.GELU(), nn.Mish(), nn.Softplus(), nn.ELU(), nn.CELU(), nn.SELU(), nn.Hardswish()
        )
    ),
    "gated activation, softmax": Animal(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.GLU(), nn.Softmax(1), nn.LogSigmoid(), nn.Linear(3, 1)
        )
    ),
    "PReLU": Animal(lambda: conv(nn.PReLU(4)), IMAGE, adam=True),
    "RReLU, random slopes": Animal(lambda: conv(nn.RReLU()), IMAGE),
    "function of one's own": Animal(lambda: mlp(Cubed())),
    # Normalisation
    "InstanceNorm1d, no affine": Animal(
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 2), nn.InstanceNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)
        ),
        TOKENS,
    ),
    "InstanceNorm2d, no affine": Animal(lambda: conv(nn.InstanceNorm2d(4)), IMAGE, adam=True),
    "BatchNorm3d": Animal(
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)
        ),
        (1, 3, 3, 3),
    ),
    "SyncBatchNorm, one process": Animal(lambda: mlp(nn.SyncBatchNorm(6))),
    "LocalResponseNorm": Animal(lambda: conv(nn.LocalResponseNorm(2)), IMAGE),
    "weight standardisation": Animal(
        lambda: nn.Sequential(
            StandardisedConvolution(2, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1)
        ),
        IMAGE,
    ),
    "spectral norm, transposed conv": Animal(
        lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.ConvTranspose2d(2, 3, 2)),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(147, 1),
        ),
        IMAGE,
        steps=5,
    ),
    "spectral norm, eval": Animal(lambda: both(parametrizations.spectral_norm).eval(), steps=5),
    "spectral norm, several iterations": Animal(
        lambda: both(lambda m: parametrizations.spectral_norm(m, n_power_iterations=3)),
        steps=5,
        adam=True,
    ),
    "cached parametrization": Animal(CachedWeights),
    "pruned": Animal(_pruned),
    # Convolutions and pictures
    "transposed conv": Animal(
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, 2), nn.Tanh(), nn.Conv2d(3, 1, 3)), IMAGE
    ),
    "grouped, dilated conv": Animal(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2, dilation=2), nn.Tanh(), nn.Conv2d(4, 1, 1)
        ),
        IMAGE,
    ),
    "circular padding": Animal(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.SiLU(), nn.Conv2d(4, 1, 1)
        ),
        IMAGE,
    ),
    "gated causal Conv1d": Animal(
        lambda: nn.Sequential(
            nn.ConstantPad1d((1, 0), 0.0), nn.Conv1d(4, 6, 2), nn.GLU(1), nn.Conv1d(3, 1, 1)
        ),
        TOKENS,
    ),
    "max pooling": Animal(
        lambda: conv(nn.MaxPool2d(2), nn.Upsample((3, 3), mode="bicubic")), IMAGE
    ),
    "adaptive and power pooling": Animal(
        lambda: conv(nn.LPPool2d(2, 2), nn.AdaptiveMaxPool2d(2), nn.UpsamplingNearest2d((3, 3))),
        IMAGE,
    ),
    "pixel shuffles": Animal(
        lambda: nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(8, 4, 1),
            nn.Tanh(),
            nn.PixelShuffle(2),
            nn.Conv2d(1, 1, 2),
        ),
        IMAGE,
    ),
    "blur pool": Animal(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.SiLU(), Blur(3), nn.Flatten(), nn.Linear(27, 1)
        ),
        IMAGE,
    ),
    "squeeze and excitation": Animal(lambda: conv(Excitation(4)), IMAGE),
    "spatial transformer": Animal(nets.Spatial, IMAGE),
    "patches": Animal(nets.Patches, IMAGE),
    "tied conv": Animal(TiedConvolution, IMAGE, adam=True),
    # Sequences and sets
    "vision transformer": Animal(nets.VisionTransformer, IMAGE, adam=True),
    "cross-attention": Animal(nets.CrossAttention, TOKENS),
    "LSTM cells": Animal(nets.Cells, TOKENS),
    "LSTM, projected": Animal(
        lambda: Recurrent(nn.LSTM(3, 5, batch_first=True, proj_size=2), 2), TOKENS
    ),
    "GRU, dropout": Animal(
        lambda: Recurrent(nn.GRU(3, 4, 2, batch_first=True, dropout=0.3), 4), TOKENS
    ),
    "weight norm, LSTM": Animal(
        lambda: Recurrent(_recurrent_weight(parametrizations.weight_norm), 5), TOKENS
    ),
    "spectral norm, LSTM": Animal(
        lambda: Recurrent(_recurrent_weight(parametrizations.spectral_norm), 5), TOKENS, steps=5
    ),
    "minibatch discrimination": Animal(nets.MinibatchDiscrimination),
    "message passing": Animal(nets.MessagePassing),
    "sparse adjacency, distances": Animal(nets.SparseGraph),
    "order statistics": Animal(nets.Sorted),
    "linear algebra": Animal(nets.LogDeterminant),
    "bilinear, einsum": Animal(nets.Bilinear),
    # Conditions
    "embedding, padding index": Animal(
        lambda: nets.Labelled(nn.Embedding(4, 4, padding_idx=0)),
        feed=labelled,
        adam=True,
    ),
    "named outputs, a flag": Animal(
        nets.Named, feed=lambda x: {"x": x, "slope": 1.5}, objective=nets.Auxiliary()
    ),
    # What the forward pass does
    "noise": Animal(lambda: nn.Sequential(Noise(), mlp(Noise())), adam=True),
    "stochastic depth": Animal(StochasticDepth),
    "alpha dropout": Animal(lambda: mlp(nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2))),
    "dropout, in place": Animal(lambda: mlp(nn.Dropout(0.3, inplace=True), nn.BatchNorm1d(6))),
    "attributes set by forward": Animal(Remembering, adam=True),
    "forward hooks": Animal(_hooked),
    "gradient through torch.func": Animal(lambda: nets.InnerGradient(mlp(), functional=True)),
    "gradient inside D": Animal(lambda: nets.InnerGradient(mlp(), functional=False), adam=True),
    "penalty of one's own": Animal(lambda: mlp(), objective=nets.OwnPenalty()),
    "complex weights as real ones": Animal(ComplexWeights),
    "lazy, run once": Animal(_lazy),
    # Wrappers
    "compiled": Animal(lambda: compiled(mlp())),
    "compiled part": Animal(
        lambda: nn.Sequential(compiled(nn.Sequential(nn.Linear(4, 6), nn.Tanh())), nn.Linear(6, 1))
    ),
    "DataParallel": Animal(lambda: nn.DataParallel(mlp(nn.BatchNorm1d(6)))),
    # Under a penalty
    "conv, max pooling + R1": Animal(
        lambda: conv(nn.MaxPool2d(2), nn.Upsample((3, 3))), IMAGE, objective=Minimax() + R1(2.0)
    ),
    "vision transformer + R1": Animal(nets.VisionTransformer, IMAGE, objective=Minimax() + R1(2.0)),
    "BatchNorm1d + R1": Animal(
        lambda: mlp(nn.BatchNorm1d(6)), objective=Minimax() + R1(2.0), adam=True
    ),
    "BatchNorm2d + R1": Animal(
        lambda: conv(nn.BatchNorm2d(4)), IMAGE, objective=Minimax() + R1(2.0)
    ),
    "BatchNorm2d, no affine + R2": Animal(
        lambda: conv(nn.BatchNorm2d(4, affine=False)), IMAGE, objective=Minimax() + R2(2.0)
    ),
    "BatchNorm of the input + R1 + R2": Animal(
        lambda: nn.Sequential(nn.BatchNorm1d(4), mlp()),
        objective=RelativisticPairing() + R1(1.0) + R2(1.0),
    ),
    "BatchNorm, cumulative + WGAN-GP": Animal(
        lambda: mlp(nn.BatchNorm1d(6, momentum=None)),
        objective=Wasserstein() + GradientPenalty(1.0),
    ),
    "BatchNorm2d + WGAN-GP": Animal(
        lambda: conv(nn.BatchNorm2d(4)), IMAGE, objective=Wasserstein() + GradientPenalty(1.0)
    ),
    "BatchNorm3d + R1": Animal(
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)
        ),
        (1, 3, 3, 3),
        objective=Minimax() + R1(2.0),
    ),
    "BatchNorm, DRAGAN": Animal(lambda: mlp(nn.BatchNorm1d(6)), objective=nets.Dragan(), adam=True),
    "BatchNorm, gradient inside D": Animal(
        lambda: nets.InnerGradient(mlp(nn.BatchNorm1d(6)), functional=False)
    ),
    "functional norms + R1": Animal(nets.Kernels, TOKENS, objective=Minimax() + R1(2.0)),
    "functional norms, gradient through torch.func": Animal(
        lambda: nets.InnerGradient(nets.Kernels(), functional=True), TOKENS
    ),
    "InstanceNorm2d + R1": Animal(
        lambda: conv(nn.InstanceNorm2d(4)), IMAGE, objective=Minimax() + R1(2.0)
    ),
    "InstanceNorm2d + R2": Animal(
        lambda: conv(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        IMAGE,
        objective=Minimax() + R2(2.0),
    ),
    "InstanceNorm2d, eval + R1": Animal(
        lambda: evaluated(conv(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))),
        IMAGE,
        objective=Minimax() + R1(2.0),
    ),
    "InstanceNorm2d + WGAN-GP": Animal(
        lambda: conv(nn.InstanceNorm2d(4)),
        IMAGE,
        objective=Wasserstein() + GradientPenalty(1.0),
    ),
    "LocalResponseNorm + WGAN-GP": Animal(
        lambda: conv(nn.LocalResponseNorm(2)),
        IMAGE,
        objective=Wasserstein() + GradientPenalty(1.0),
    ),
    "GRU + WGAN-GP": Animal(
        lambda: Recurrent(nn.GRU(3, 5, batch_first=True), 5),
        TOKENS,
        objective=Wasserstein() + GradientPenalty(1.0),
    ),
    "minibatch deviation + R1 + R2": Animal(
        nets.MinibatchDeviation, objective=RelativisticPairing() + R1(1.0) + R2(1.0)
    ),
}


def _lacks(function: Callable[[Tensor], Tensor]) -> bool:
    """Return whether this version of torch has no second derivative of a function."""
    x = torch.rand(1, 2, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(gradient.square().sum(), x)
    except RuntimeError:
        return True
    return False


# Animals that are refused where torch is too old for them.
TOO_NEW = {
    name: ZOO.pop(name)
    for name, function in {
        "spatial transformer": lambda x: F.grid_sample(x, x.mT, align_corners=False),
        "sparse adjacency, distances": lambda x: torch.cdist(x, x + 1),
    }.items()
    if _lacks(function)
}
