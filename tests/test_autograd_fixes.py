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
