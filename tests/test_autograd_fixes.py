"""Layers and functions whose derivatives PyTorch has wrong or not at all."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import unroll
from tests.players import assert_live, fakes, tanh_net
from tests.settings import DEVICE, randn
from unroll import R1, Minimax, UnrolledGeneratorLoss


@pytest.mark.parametrize("dim", [-2, 0, 1, None])
def test_weight_norm_counts_dimensions_from_the_end_too(dim: int | None) -> None:
    normalised: Any = weight_norm
    d = nn.Sequential(normalised(nn.Linear(3, 4), dim=dim), nn.Tanh(), nn.Linear(4, 1))
    d.to(DEVICE, torch.float64)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2)
    assert_live(loss)
    assert unroll.check_gradients(loss, fakes(), randn(5, 3)).ok


def test_native_layer_norm_under_a_penalty() -> None:
    class Native(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
            self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
            self.to(DEVICE, torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            y, mean, rstd = torch.native_layer_norm(
                self.layer(x), [4], self.scale, self.shift, 1e-5
            )
            assert mean.shape == rstd.shape == (len(x), 1)
            output: Tensor = self.head(torch.tanh(y))
            return output

    d = Native()
    loss = UnrolledGeneratorLoss(
        d, torch.optim.Adam(d.parameters(), lr=0.05), Minimax() + R1(1.0), unroll_steps=2
    )
    assert unroll.check_gradients(loss, fakes(), randn(5, 3)).ok


class InputGradient(unroll.Minimax):
    """The generator minimises a gradient norm, which takes one derivative more."""

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(discriminator(fake).sum(), fake, create_graph=True)
        loss: Tensor = gradient.square().sum()
        return loss


def test_weight_norm_is_right_in_the_generator_loss_too() -> None:
    d = tanh_net()
    weight_norm(d[0])
    loss = UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), lr=0.3), InputGradient(), unroll_steps=2
    )
    assert unroll.check_gradients(loss, fakes(), fakes()).ok


def test_cached_parametrizations_are_evaluated_at_every_step() -> None:
    d, real, fake = tanh_net(), randn(5, 3), fakes()
    weight_norm(d[0])
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=3)
    value = loss(fake, real)
    with parametrize.cached():
        assert torch.equal(loss(fake, real), value)
        assert parametrize._cache_enabled


class Applied(nn.Module):
    """A D with a function of hidden units and a weight in its middle."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.body, self.head = function, nn.Linear(3, 4), nn.Linear(4, 1)
        self.weight = nn.Parameter(torch.linspace(1, 2, 16).view(4, 4))
        self.to(DEVICE).double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.function(self.body(x), self.weight)))
        return output


ATEN = torch.ops.aten
PENALISED = unroll.Minimax() + unroll.R1(1.0)
HIDDEN: dict[str, tuple[Any, Any]] = {  # as torch.export and torch.jit call them, and the game
    "weight norm": (
        lambda x, w: x @ ATEN._weight_norm(w, torch.ones_like(w[:, :1]), 0).t(),
        unroll.Minimax(),
    ),
    "layer norm": (lambda x, w: ATEN.layer_norm(x, [4], w[0]), PENALISED),
    "layer norm, overload": (
        lambda x, w: ATEN.native_layer_norm.default(x, [4], w[0], None, 1e-5)[0],
        PENALISED,
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_norm_that_cannot_be_replaced_is_refused_where_its_derivative_is_wrong(name: str) -> None:
    function, game = HIDDEN[name]
    d, fake, real = Applied(function), fakes(), randn(5, 3)
    pattern = r"PyTorch's derivative of \w+Norm\w+ is wrong.*Call torch\.nn\.functional"
    with pytest.raises(RuntimeError, match=pattern):
        UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), game, unroll_steps=2)(
            fake, real
        )
    assert UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), lr=0.3), game, unroll_steps=2, stop_gradient=True
    )(fake, real).isfinite()


def test_a_layer_norm_is_right_however_it_is_called_where_there_is_no_penalty() -> None:
    fake, real = fakes(), randn(5, 3)
    found = []
    for function in (HIDDEN["layer norm"][0], lambda x, w: torch.layer_norm(x, [4], w[0])):
        torch.manual_seed(0)
        d = Applied(function)
        found.append(
            torch.autograd.grad(
                UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2)(
                    fake, real
                ),
                fake,
            )
        )
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)
