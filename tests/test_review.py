"""Cases that a review found: each was silently wrong, or a raw error, once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_map

import unroll
from tests.settings import DEVICE, randn

Loss = unroll.UnrolledGeneratorLoss


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DEVICE).double()


def sgd(d: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(d.parameters(), lr=0.3)


def fakes() -> Tensor:
    return randn(5, 3).requires_grad_()


def test_an_in_place_root_in_a_transformation_is_in_place() -> None:
    def update(updates: Any, state: Any, **_: Any) -> Any:
        def step(g: Tensor) -> Tensor:
            v = g * g + 1e-4
            v.sqrt_()
            return -0.1 * g / v

        return tree_map(step, updates), state

    d, real, fake = net(), randn(5, 3), randn(5, 3)
    ahead = Loss(d, GradientTransformation(lambda _: (), update), unroll_steps=1).unroll(fake, real)
    theta = list(d.parameters())
    value = unroll.Minimax().discriminator_loss(d, fake, real)
    updates, _ = update(torch.autograd.grad(value, theta), ())
    for p, u, q in zip(theta, updates, ahead.parameters.values(), strict=True):
        torch.testing.assert_close(q, p + u, rtol=1e-12, atol=0)


class FromAList(nn.Module):
    """It reads its weight from a plain list, where nobody can put another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(x @ self.weights[0].T))
        return output


def test_a_parameter_in_a_plain_list_is_refused() -> None:
    d = FromAList().to(DEVICE).double()
    with pytest.raises(RuntimeError, match=r"uses the parameter 'layer\.weight' other than"):
        Loss(d, sgd(d), unroll_steps=2)(fakes(), randn(5, 3))
    assert d.layer.weight.grad is None


def in_no_grad(theta: Any) -> Any:
    with torch.no_grad():
        for p in theta.values():
            p.clamp_(-0.01, 0.01)
    return theta


@pytest.mark.parametrize(
    "project",
    [
        in_no_grad,
        lambda theta: {k: p.detach().clamp(-0.01, 0.01) for k, p in theta.items()},
        lambda theta: [p.data.clamp_(-0.01, 0.01) for p in theta.values()] and theta,
    ],
)
def test_a_projection_outside_autograd_is_refused(project: Any) -> None:
    d = net()
    with pytest.raises(
        ValueError, match=r"project: must be differentiable; it changed '0\.weight'"
    ):
        Loss(d, sgd(d), unroll_steps=2, project=project)(fakes(), randn(5, 3))


class InputGradient(unroll.Minimax):
    """The generator minimises a gradient norm, which takes one derivative more."""

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(discriminator(fake).sum(), fake, create_graph=True)
        loss: Tensor = gradient.square().sum()
        return loss


def test_weight_norm_is_right_in_the_generator_loss_too() -> None:
    d = net()
    weight_norm(d[0])
    loss = Loss(d, sgd(d), InputGradient(), unroll_steps=2)
    assert unroll.check_gradients(loss, fakes(), fakes()).ok


def test_complex_parameters_are_refused() -> None:
    d = nn.Linear(3, 1, dtype=torch.complex128)
    with pytest.raises(TypeError, match=r"parameter 'weight' is complex.*real and imaginary"):
        Loss(d, sgd(d), unroll_steps=1)


@pytest.mark.parametrize("penalty", [unroll.R1(1.0), unroll.R2(1.0), unroll.GradientPenalty(1.0)])
def test_penalties_take_samples_that_are_numbers(penalty: Any) -> None:
    class Dirac(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.psi = nn.Parameter(torch.ones((), device=DEVICE, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.psi * x

    d = Dirac()
    loss = Loss(d, sgd(d), unroll.Minimax() + penalty, unroll_steps=1)
    assert loss(randn(5).requires_grad_(), randn(5)).isfinite()


def test_the_terms_of_a_frozen_parameter_are_zeros() -> None:
    d, g = net(), nn.Linear(2, 3).to(DEVICE).double()
    g.weight.requires_grad_(False)
    loss = Loss(d, sgd(d), unroll_steps=1)
    first, second = unroll.gradient_terms(loss, g(randn(5, 2)), randn(5, 3), g.parameters())
    assert not first[0].any()
    assert not second[0].any()
    assert first[1].any()


def test_a_detached_look_ahead_does_not_count_as_the_inspected_one() -> None:
    d = FromAList().to(DEVICE).double()
    loss = Loss(d, sgd(d), unroll_steps=2)
    loss.unroll(randn(5, 3), randn(5, 3))
    with pytest.raises(RuntimeError, match=r"uses the parameter 'layer\.weight' other than"):
        loss(fakes(), randn(5, 3))


def test_a_projection_of_a_partly_frozen_discriminator_is_no_mistake() -> None:
    d = net()
    d[0].requires_grad_(False)
    optimizer = torch.optim.SGD(d[2].parameters(), lr=0.3)

    def clip(theta: Any) -> Any:
        return {name: p.clamp(-0.1, 0.1) for name, p in theta.items()}

    loss = Loss(d, optimizer, unroll_steps=2, project=clip)
    assert unroll.check_gradients(loss, fakes(), fakes()).ok
    assert loss(fakes(), randn(5, 3)).isfinite()
