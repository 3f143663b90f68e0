"""Finite and right gradients where the optimizer divides by the root of a zero second moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import unroll
from tests import oracles
from tests.games import Game
from tests.settings import DEVICE

EPS, LR = 0.01, 0.2

# name -> (what trains D with LR and an eps, slope of one step at a zero gradient from no state)
ADAPTIVE: dict[str, tuple[Callable[[nn.Module, float], Any], Callable[[float], float]]] = {
    "adam": (lambda _, eps: torchopt.adam(LR, eps=eps), lambda eps: 1 / eps),
    "adamw": (lambda _, eps: torchopt.adamw(LR, eps=eps, weight_decay=0.0), lambda eps: 1 / eps),
    "adamax": (lambda _, eps: torchopt.adamax(LR, eps=eps), lambda eps: 1 / eps),
    "radam": (lambda _, eps: torchopt.radam(LR, eps=eps), lambda _: 1.0),
    "rmsprop": (lambda _, eps: torchopt.rmsprop(LR, eps=eps), lambda eps: 1 / eps),
    "rmsprop centered": (
        lambda _, eps: torchopt.rmsprop(LR, eps=eps, centered=True),
        lambda eps: 1 / eps,
    ),
    "adagrad": (lambda _, eps: torchopt.adagrad(LR, eps=eps), lambda eps: 1 / eps),
    "adadelta": (lambda _, eps: torchopt.adadelta(LR, eps=eps), lambda _: 1.0),
    "chain": (
        lambda _, eps: torchopt.chain(
            torchopt.transform.nan_to_num(0.0), torchopt.adam(LR, eps=eps)
        ),
        lambda eps: 1 / eps,
    ),
    "Optimizer Adam": (
        lambda d, eps: torchopt.Adam(d.parameters(), LR, eps=eps),
        lambda eps: 1 / eps,
    ),
    "Optimizer AdamW": (
        lambda d, eps: torchopt.AdamW(d.parameters(), LR, eps=eps, weight_decay=0.0),
        lambda eps: 1 / eps,
    ),
    "Optimizer RMSProp": (
        lambda d, eps: torchopt.RMSProp(d.parameters(), LR, eps=eps, centered=True),
        lambda eps: 1 / eps,
    ),
    "Optimizer Adagrad": (
        lambda d, eps: torchopt.Adagrad(d.parameters(), LR, eps=eps),
        lambda eps: 1 / eps,
    ),
    "Optimizer Adadelta": (
        lambda d, eps: torchopt.Adadelta(d.parameters(), LR, eps=eps),
        lambda _: 1.0,
    ),
    "Optimizer RAdam": (
        lambda d, eps: torchopt.RAdam(d.parameters(), LR, eps=eps),
        lambda _: 1.0,
    ),
    "MetaAdam": (lambda d, eps: torchopt.MetaAdam(d, LR, eps=eps), lambda eps: 1 / eps),
    "MetaRMSProp": (lambda d, eps: torchopt.MetaRMSProp(d, LR, eps=eps), lambda eps: 1 / eps),
    "FuncOptimizer adam": (
        lambda _, eps: torchopt.FuncOptimizer(torchopt.adam(LR, eps=eps)),
        lambda eps: 1 / eps,
    ),
    "torch Adam": (
        lambda d, eps: torch.optim.Adam(d.parameters(), LR, eps=eps),
        lambda eps: 1 / eps,
    ),
    "torch AdamW": (
        lambda d, eps: torch.optim.AdamW(d.parameters(), LR, eps=eps, weight_decay=0.0),
        lambda eps: 1 / eps,
    ),
    "torch amsgrad": (
        lambda d, eps: torch.optim.Adam(d.parameters(), LR, eps=eps, amsgrad=True),
        lambda eps: 1 / eps,
    ),
    "torch NAdam": (
        lambda d, eps: torch.optim.NAdam(d.parameters(), LR, eps=eps, betas=(0.0, 0.9)),
        lambda eps: 1 / eps,
    ),
    "torch RAdam": (
        lambda d, eps: torch.optim.RAdam(d.parameters(), LR, eps=eps),
        lambda _: 1.0,
    ),
    "torch Adamax": (
        lambda d, eps: torch.optim.Adamax(d.parameters(), LR, eps=eps),
        lambda eps: 1 / eps,
    ),
    "torch RMSprop": (
        lambda d, eps: torch.optim.RMSprop(d.parameters(), LR, eps=eps),
        lambda eps: 1 / eps,
    ),
    "torch RMSprop centered": (
        lambda d, eps: torch.optim.RMSprop(d.parameters(), LR, eps=eps, centered=True),
        lambda eps: 1 / eps,
    ),
    "torch Adagrad": (
        lambda d, eps: torch.optim.Adagrad(d.parameters(), LR, eps=eps),
        lambda eps: 1 / eps,
    ),
    "torch Adadelta": (
        lambda d, eps: torch.optim.Adadelta(d.parameters(), LR, eps=eps),
        lambda _: 1.0,
    ),
}

# Steps that are not a constant times g / (|g| + eps): central differences are their whole test.
OTHERS: dict[str, Callable[[nn.Module, float], Any]] = {
    "torch NAdam momentum": lambda d, eps: torch.optim.NAdam(d.parameters(), LR, eps=eps),
    "torch RMSprop momentum": lambda d, eps: torch.optim.RMSprop(
        d.parameters(), LR, eps=eps, momentum=0.7, centered=True
    ),
    "torch ASGD": lambda d, _: torch.optim.ASGD(d.parameters(), LR, lambd=0.1, t0=1),
    "torch Rprop": lambda d, _: torch.optim.Rprop(d.parameters(), LR),
}
BUILD = {name: build for name, (build, _) in ADAPTIVE.items()} | OTHERS


def dead_units() -> nn.Module:
    """Return a discriminator two of whose units are off for every sample."""
    first, second = nn.Linear(2, 6), nn.Linear(6, 4)
    with torch.no_grad():
        first.bias[:2] = -100.0
        second.bias[0] = -100.0
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(4, 1))


def zero_last_layer() -> nn.Module:
    """Return a discriminator whose first gradient is zero in all layers but the last."""
    last = nn.Linear(5, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(2, 5), nn.LeakyReLU(0.2), last)


def biased() -> nn.Module:
    """Return a discriminator whose output bias cancels in a difference of two outputs."""
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))


class Sure(nn.Module):
    """A discriminator beyond the margins of the hinge at every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(2, 1)
        with torch.no_grad():
            self.scale.weight.fill_(100.0)
            self.scale.bias.fill_(-50.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale(x)
        return y


class Spare(nn.Module):
    """A discriminator with parameters that its output does not depend on, or on as 0 * p."""

    def __init__(self) -> None:
        super().__init__()
        self.body = biased()
        self.unused = nn.Linear(3, 3)
        self.multiplied_by_zero = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x + 0 * self.multiplied_by_zero)
        return y


SITUATIONS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "dead units": (dead_units, unroll.Minimax()),
    "zero last layer": (zero_last_layer, unroll.NonSaturating()),
    "Wasserstein with a bias": (biased, unroll.Wasserstein()),
    "pairing with a bias": (biased, unroll.RelativisticPairing()),
    "Wasserstein with a bias and R1": (biased, unroll.Wasserstein() + unroll.R1(1.0)),
    "saturated hinge": (Sure, unroll.Hinge()),
    "unused parameters": (Spare, unroll.Minimax()),
}


class Situation:
    """A game with zero second moments, in some precision."""

    def __init__(self, name: str, optimizer: str, eps: float, *, steps: int, warm: int) -> None:
        build, objective = SITUATIONS[name]
        self.game = Game(2, build)
        if name == "saturated hinge":
            self.game.real = [1.0 + 0.1 * x for x in self.game.real]
            self.game.theta = 0.1 * self.game.theta
        inner = BUILD[optimizer](self.game.discriminator, eps)
        self.arguments = {} if name == "saturated hinge" else self.game.warmed(inner, warm)
        self.loss = unroll.UnrolledGeneratorLoss(
            self.game.discriminator, inner, objective, unroll_steps=steps
        )

    def surrogate(self, theta: Tensor) -> Tensor:
        value: Tensor = self.loss(self.game.fake(theta), self.game.real[0], **self.arguments)
        return value


@pytest.mark.parametrize("optimizer", BUILD)
@pytest.mark.parametrize("name", SITUATIONS)
def test_central_differences_at_zero_moments(name: str, optimizer: str) -> None:
    for warm in (0, 6 if optimizer == "torch RAdam" else 1):  # then RAdam divides by the root
        situation = Situation(name, optimizer, 1e-8, steps=2, warm=warm)
        theta = situation.game.theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(situation.surrogate(theta), theta)
        assert gradient.isfinite().all()
        torch.manual_seed(1)
        error = oracles.relative_error(situation.surrogate, situation.game.theta, gradient, 1)
        assert error <= 1e-6, f"after {warm} real steps: {error:.1e}"


def test_the_situations_have_zero_gradients() -> None:
    for build, objective in SITUATIONS.values():
        situation = Game(2, build)
        d = situation.discriminator
        real, fake = situation.real[0], situation.fake(situation.theta)
        if isinstance(d, Sure):
            real, fake = 1.0 + 0.1 * real, 0.1 * fake
        loss = objective.discriminator_loss(d, fake, real)
        gradients = torch.autograd.grad(loss, list(d.parameters()), allow_unused=True)
        assert any((g == 0).any() for g in gradients if g is not None)


@pytest.mark.parametrize("optimizer", ADAPTIVE)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_slope_at_a_zero_moment(steps: int, optimizer: str) -> None:
    """A Dirac-GAN with D(x) = psi x at theta = r, where Wasserstein's gradient theta - r is zero.

    Every step has the slope of g / (|g| + eps), which is 1 / eps at zero (1 for an optimizer that
    takes a plain step there), so that psi_K' = -eta K slope, and f_K = -psi_K theta.
    """
    build, slope = ADAPTIVE[optimizer]
    d = nn.Linear(1, 1, bias=False, device=DEVICE, dtype=torch.float64)
    loss = unroll.UnrolledGeneratorLoss(d, build(d, EPS), unroll.Wasserstein(), unroll_steps=steps)
    fake = torch.full((1, 1), 0.7, device=DEVICE, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(fake, fake.detach()), fake)
    expected = -d.weight.item() + LR * steps * slope(EPS) * 0.7
    assert gradient.item() == pytest.approx(expected, rel=1e-6)


class Faint:
    """Wasserstein's game with a discriminator's loss so small that its square underflows."""

    scale = 1e-24

    def discriminator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        return self.scale * unroll.Wasserstein().discriminator_loss(discriminator, fake, real)

    def generator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        return unroll.Wasserstein().generator_loss(discriminator, fake, real)


@pytest.mark.parametrize("optimizer", ADAPTIVE)
@pytest.mark.parametrize("steps", [1, 2])
def test_slope_where_the_square_underflows(steps: int, optimizer: str) -> None:
    """In float32 g = 1e-24 (theta - r) has g^2 = 0, and a step is eta slope g.

    With psi = 0, f_K = eta K slope 1e-24 (theta - r) theta.
    """
    build, slope = ADAPTIVE[optimizer]
    d = nn.Linear(1, 1, bias=False, device=DEVICE)
    nn.init.zeros_(d.weight)
    loss = unroll.UnrolledGeneratorLoss(d, build(d, 1e-8), Faint(), unroll_steps=steps)
    fake = torch.tensor([[0.75]], device=DEVICE, requires_grad=True)
    value = loss(fake, torch.tensor([[0.25]], device=DEVICE))
    (gradient,) = torch.autograd.grad(value, fake)
    unit = LR * steps * slope(1e-8) * Faint.scale
    if optimizer in ("adagrad", "Optimizer Adagrad"):  # torchopt's step is zero where g^2 is
        assert value.item() == gradient.item() == 0
        return
    assert value.item() == pytest.approx(unit * 0.5 * 0.75, rel=1e-4, abs=0)
    assert gradient.item() == pytest.approx(unit * (2 * 0.75 - 0.25), rel=1e-4, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", BUILD)
def test_wide_relu_networks_stay_finite(optimizer: str, dtype: torch.dtype) -> None:
    """Most units of a wide network are dead on a small batch, and some gradients underflow."""
    d = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    d.to(DEVICE, dtype)
    loss = unroll.UnrolledGeneratorLoss(d, BUILD[optimizer](d, 1e-8), unroll_steps=3)
    fake = torch.randn(8, 2, device=DEVICE, dtype=dtype, requires_grad=True)
    value = loss(fake, torch.randn(8, 2, device=DEVICE, dtype=dtype))
    (gradient,) = torch.autograd.grad(value, fake)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_equals_the_naive_loop_with_a_guarded_root() -> None:
    for build, objective in SITUATIONS.values():
        if build in (Spare, Sure):  # the loop knows no unused parameters
            continue
        game = Game(2, build)
        loss = unroll.UnrolledGeneratorLoss(
            game.discriminator,
            torch.optim.Adam(game.discriminator.parameters(), LR, eps=EPS),
            objective,
            unroll_steps=3,
        )
        theta = game.theta.clone().requires_grad_()
        fake, real = game.fake(theta), game.real[0]
        naive = oracles.naive_surrogate(
            game.discriminator,
            oracles.adam(LR, eps=EPS),
            objective,
            fake,
            real,
            [(fake, real)] * 3,
        )
        (ours,) = torch.autograd.grad(loss(fake, real), theta, retain_graph=True)
        (expected,) = torch.autograd.grad(naive, theta)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
