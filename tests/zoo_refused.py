"""Discriminators that cannot look ahead, and how each is refused by name."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.settings import DEVICE
from tests.zoo import TOO_NEW, Batch, labelled
from tests.zoo_layers import mlp
from tests.zoo_networks import Labelled
from unroll import Minimax, Objective

MINIMAX = Minimax()


@dataclass(frozen=True)
class Refusal:
    """A discriminator, how it is fed, and the exception with its message."""

    build: Callable[[], nn.Module]
    error: type[Exception]
    message: str
    shape: tuple[int, ...] = (4,)
    feed: Callable[[Tensor], Batch] = lambda x: x
    objective: Objective = MINIMAX

    def make(self) -> nn.Module:
        """Return the discriminator, in float64 where it has a choice."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scripting and quantisation are deprecated
            return self.build()


class Checkpointed(nn.Module):
    """Activation checkpointing inside D, of its first layers or of its middle."""

    def __init__(self, *, reentrant: bool, first: bool = False) -> None:
        super().__init__()
        self.reentrant, self.first = reentrant, first
        self.before, self.body = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else self.before(x)
        hidden = checkpoint(self.body, x, use_reentrant=self.reentrant)
        output: Tensor = self.head(hidden)
        return output


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = 2 * x * grad
        return slope


class Fused(nn.Module):
    """A layer like a fused kernel: its gradient has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Once.apply(x))


class Clamped(nn.Module):
    """A D that clips its own weights, in place or through ``.data``, as it runs."""

    def __init__(self, *, data: bool) -> None:
        super().__init__()
        self.data, self.body = data, nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.body.weight.data if self.data else self.body.weight
            weight.clamp_(-0.1, 0.1)
        output: Tensor = self.body(x)
        return output


class PlainList(nn.Module):
    """A parameter that D also keeps where no one can find it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.weights = [self.body.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) @ self.weights[0].sum(0)


class ComplexLayer(nn.Module):
    """Complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(x.to(torch.complex128)).abs().sum(1)
        return output


def _d64(d: nn.Module) -> nn.Module:
    return d.to(DEVICE, torch.float64)


REFUSED: dict[str, Refusal] = {
    "fused layer": Refusal(
        lambda: _d64(mlp(Fused())),
        RuntimeError,
        r"discriminator: .*derivative.*\b1 \(Fused\).*stop_gradient=True",
    ),
    "embedding bag": Refusal(
        lambda: _d64(Labelled(nn.EmbeddingBag(4, 4, mode="mean"))),
        RuntimeError,
        r"discriminator: .*derivative.* \(EmbeddingBag\).*stop_gradient=True",
        feed=lambda x: (x, torch.stack([labelled(x)[1], labelled(x)[1] + 1], 1)),
    ),
    "Hardsigmoid": Refusal(
        lambda: _d64(mlp(nn.Hardsigmoid())),
        RuntimeError,
        r"discriminator: .*derivative.*\b1 \(Hardsigmoid\).*stop_gradient=True",
    ),
    "activation checkpointing": Refusal(
        lambda: _d64(Checkpointed(reentrant=False)),
        RuntimeError,
        r"discriminator: activation checkpointing.*Switch torch\.utils\.checkpoint off",
    ),
    "activation checkpointing, reentrant": Refusal(
        lambda: _d64(Checkpointed(reentrant=True)),
        RuntimeError,
        r"discriminator: activation checkpointing.*Switch torch\.utils\.checkpoint off",
    ),
    "scripted": Refusal(
        lambda: torch.jit.script(_d64(mlp())),
        TypeError,
        r"discriminator: a torch\.jit module \(the discriminator itself\).*Pass the nn\.Module",
    ),
    "scripted part": Refusal(
        lambda: nn.Sequential(_d64(nn.Linear(4, 4)), torch.jit.script(_d64(mlp()))),
        TypeError,
        r"discriminator: a torch\.jit module \(1\).*Pass the nn\.Module",
    ),
    "traced": Refusal(
        lambda: torch.jit.trace(_d64(mlp()), torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)),
        TypeError,
        r"discriminator: a torch\.jit module \(the discriminator itself\).*Pass the nn\.Module",
    ),
    "complex weights": Refusal(
        lambda: ComplexLayer().to(DEVICE),
        TypeError,
        r"discriminator: parameter 'body\.weight' is complex.*real and imaginary parts",
    ),
    "lazy": Refusal(
        lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 1)),
        ValueError,
        r"discriminator: parameter '0\.weight' is not initialised.*Run one batch",
    ),
    "embedding, max_norm": Refusal(
        lambda: _d64(Labelled(nn.Embedding(4, 4, max_norm=0.5))),
        RuntimeError,
        r"discriminator: .*must not change its parameters.*'embed\.weight'.*project=",
        feed=labelled,
    ),
    "embedding, sparse": Refusal(
        lambda: _d64(Labelled(nn.Embedding(4, 4, sparse=True))),
        TypeError,
        r"discriminator: the gradient of 'embed\.weight' is sparse.*sparse=False",
        feed=labelled,
    ),
    "embedding by frequency": Refusal(
        lambda: _d64(Labelled(nn.Embedding(4, 4, scale_grad_by_freq=True))),
        RuntimeError,
        r"discriminator: scale_grad_by_freq=True.*Set it to False, or stop_gradient=True",
        feed=labelled,
    ),
    "clips itself": Refusal(
        lambda: _d64(Clamped(data=False)),
        RuntimeError,
        r"discriminator: .*must not change its parameters.*'body\.weight'.*project=",
    ),
    "clips itself through .data": Refusal(
        lambda: _d64(Clamped(data=True)),
        RuntimeError,
        r"discriminator: .*must not change its parameters.*'body\.weight'.*project=",
    ),
    "parameters in a plain list": Refusal(
        lambda: _d64(PlainList()),
        RuntimeError,
        r"discriminator, objective: .*'body\.weight'.*plain list.*read parameters as attributes",
    ),
    "no parameters": Refusal(
        nn.Flatten,
        ValueError,
        r"discriminator: must have parameters.*Flatten has none.*optimizer trains",
    ),
    **{
        name: Refusal(
            animal.make,
            RuntimeError,
            r"discriminator: .*derivative that PyTorch does not have.*Replace it",
            animal.shape,
        )
        for name, animal in TOO_NEW.items()
    },
}
