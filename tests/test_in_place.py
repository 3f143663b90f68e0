"""Discriminators that change their input in place."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from unroll import UnrolledGeneratorLoss


class Centring(nn.Module):
    """A D that normalises what it is given where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1).to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        output: Tensor = self.layer(x)
        return output


def first_relu() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 1)).to(DEVICE, torch.float64)


@pytest.mark.parametrize("make", [Centring, first_relu])
@pytest.mark.parametrize("options", [{}, {"stop_gradient": True}, {"checkpoint": True}])
def test_an_input_that_changes_in_place_is_refused_and_left_alone(
    make: Any, options: dict[str, Any]
) -> None:
    d = make()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=3, **options)
    z, real = randn(5, 3).requires_grad_(), randn(5, 3)
    fake = 2 * z
    before = snapshot(fake, real, d)
    with pytest.raises(ValueError, match=r"^discriminator: .*must not change its input in place"):
        loss(fake, real)
    assert not changes(before, fake, real, d)


def test_the_ordinary_loss_runs_as_in_a_plain_loop() -> None:
    d = Centring()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=0)
    z = randn(5, 3).requires_grad_()
    loss(2 * z, randn(5, 3)).backward()
    assert z.grad is not None
