"""Discriminators that change their input in place."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from unroll import Minimax, UnrolledGeneratorLoss


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
    z, real = randn(5, 3).requires_grad_(), randn(5, 3)
    wanted = real.clone()
    plain = Minimax().generator_loss(d, 2 * z, wanted)
    for _ in range(2):  # the first call looks for faults
        again = real.clone()
        value = loss(2 * z, again)
        assert torch.equal(value, plain)
        torch.testing.assert_close(again, wanted)
        value.backward()
    assert z.grad is not None


class Shrinking(nn.Module):
    """A D that shrinks its own weights, out of autograd's sight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1).to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.mul_(0.9)
        output: Tensor = self.layer(x)
        return output


@pytest.mark.parametrize("unroll_steps", [0, 2])
@pytest.mark.parametrize("options", [{}, {"stop_gradient": True}, {"checkpoint": True}])
def test_a_parameter_that_changes_in_place_is_refused_and_left_alone(
    unroll_steps: int, options: dict[str, Any]
) -> None:
    d = Shrinking()
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=unroll_steps, **options)
    before = snapshot(d)
    message = (
        r"^discriminator: .*must not change its parameters in place; it changed 'layer\.weight'"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            loss(randn(5, 3).requires_grad_(), randn(5, 3))
    if unroll_steps:
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            loss(randn(5, 3), randn(5, 3))
    assert not changes(before, d)
