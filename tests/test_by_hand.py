"""What goes wrong by hand: the README's comparison with torchopt, as facts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import unroll
from tests.oracles import relative_error
from tests.settings import randn

Transformation = Any


def by_hand(d: nn.Module, impl: Transformation, fake: Tensor, real: Tensor, steps: int) -> Tensor:
    """f_K as torchopt's documented pieces give it, buffers copied."""
    game, theta = unroll.Minimax(), {n: p.detach().clone() for n, p in d.named_parameters()}
    buffers = {n: b.clone() for n, b in d.named_buffers()}

    def at(theta: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            output: Tensor = functional_call(d, {**theta, **buffers}, (x,))
            return output

        return call

    theta = {n: p.requires_grad_() for n, p in theta.items()}
    names = list(theta)
    state = impl.init(tuple(theta.values()))
    for _ in range(steps):
        values = tuple(theta.values())
        loss = game.discriminator_loss(at(theta), fake, real)
        gradients = torch.autograd.grad(loss, values, create_graph=True)
        updates, state = impl.update(gradients, state, params=values, inplace=False)
        new = torchopt.apply_updates(values, updates, inplace=False)
        theta = dict(zip(names, new, strict=True))
    return game.generator_loss(at(theta), fake, real)


def unrolled(d: nn.Module, impl: Transformation, fake: Tensor, real: Tensor, steps: int) -> Tensor:
    value: Tensor = unroll.UnrolledGeneratorLoss(d, impl, unroll_steps=steps)(fake, real)
    return value


Loss = Callable[[nn.Module, Transformation, Tensor, Tensor, int], Tensor]


def gradient_error(loss: Loss, d: nn.Module, impl: Transformation, steps: int = 3) -> float:
    """Relative error of the gradient in the fakes along a random direction."""
    fake, real = randn(6, 4).requires_grad_(), randn(6, 4)

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        with torch.enable_grad():  # by hand, D's gradients need it
            return loss(d, impl, x.requires_grad_(), real, steps)

    (gradient,) = torch.autograd.grad(f(fake), fake)
    return relative_error(f, fake.detach(), gradient, directions=1)


def net(*middle: nn.Module, first: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(first or nn.Linear(4, 8), *middle, nn.Linear(8, 1)).double()


def test_by_hand_is_right_on_a_plain_network() -> None:
    assert gradient_error(by_hand, net(nn.Tanh()), torchopt.sgd(0.5)) < 1e-6


def test_adam_is_nan_by_hand_at_a_zero_second_moment() -> None:
    dead = nn.Linear(4, 8)
    nn.init.constant_(dead.bias, -100.0)
    d = net(nn.ReLU(), first=dead)
    fake, real = randn(6, 4).requires_grad_(), randn(6, 4)
    (wrong,) = torch.autograd.grad(by_hand(d, torchopt.adam(0.1), fake, real, 2), fake)
    (right,) = torch.autograd.grad(unrolled(d, torchopt.adam(0.1), fake, real, 2), fake)
    assert not wrong.isfinite().all()
    assert right.isfinite().all()


@pytest.mark.parametrize("normalise", [spectral_norm, weight_norm])
def test_normalised_weights_have_a_wrong_derivative_by_hand(
    normalise: Callable[[nn.Module], nn.Module],
) -> None:
    d = net(nn.Tanh(), first=normalise(nn.Linear(4, 8)))
    assert gradient_error(by_hand, d, torchopt.sgd(0.5)) > 1e-5
    assert gradient_error(unrolled, d, torchopt.sgd(0.5)) < 1e-7


class Attention(nn.Module):
    """Raw attention over three tokens, which torch runs fused."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries(x).view(-1, 1, 4, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).reshape(-1, 8)


def test_fused_attention_has_no_second_derivative_by_hand() -> None:
    d = net(Attention())
    fake, real = randn(6, 4).requires_grad_(), randn(6, 4)
    with pytest.raises(RuntimeError, match="not implemented"):
        by_hand(d, torchopt.sgd(0.5), fake, real, 2).backward()
    assert gradient_error(unrolled, d, torchopt.sgd(0.5)) < 1e-7
