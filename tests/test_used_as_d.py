"""Objectives that use D as D: methods, submodules, parameters, several arguments."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

import unroll
from tests.oracles import relative_error
from tests.settings import DEVICE, randn
from unroll import Losses, UnrolledGeneratorLoss


class Featured(nn.Module):
    """A D with parts that objectives like to reach."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6) if norm else nn.Tanh())
        self.head, self.scale = nn.Linear(6, 1), nn.Parameter(torch.ones(()))
        self.gain = 2.0
        self.to(DEVICE, torch.float64)

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = torch.tanh(self.body(x))
        return h

    def forward(self, x: Any, labels: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        if isinstance(x, list):
            x = torch.cat(x)
        out: Tensor = self.head(self.features(x)) * self.scale * scale
        return out if labels is None else out + labels


def _logistic(d: Any, fake: Tensor, real: Tensor) -> Tensor:
    return softplus(d(fake)).mean() + softplus(-d(real)).mean()


def _orthogonal(d: Any, fake: Tensor, real: Tensor) -> Tensor:
    weights = [p for p in d.parameters() if p.dim() == 2]
    grams = [w @ w.t() - torch.eye(len(w), dtype=w.dtype, device=w.device) for w in weights]
    return _logistic(d, fake, real) + 0.1 * torch.stack([g.square().sum() for g in grams]).sum()


def _matching(d: Any, fake: Tensor, real: Tensor) -> Tensor:
    distance: Tensor = (d.features(fake).mean(0) - d.features(real).mean(0)).square().sum()
    return distance


GAMES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "a regulariser over parameters()": (_orthogonal, lambda d, fake, _: -d(fake).mean()),
    "a parameter": (
        lambda d, f, r: _logistic(d, f, r) + d.scale.square() + d.head.weight.square().sum(),
        lambda d, fake, _: -d(fake).mean(),
    ),
    "feature matching": (_logistic, _matching),
    "a method in both losses": (
        lambda d, f, r: _logistic(d, f, r) - 0.1 * _matching(d, f, r),
        _matching,
    ),
    "a submodule": (
        lambda d, f, r: _logistic(d, f, r) + d.body(f).square().mean(),
        lambda d, fake, _: -d.head(torch.tanh(d.body(fake))).mean(),
    ),
    "two arguments": (
        lambda d, f, r: softplus(d(f, f[:, :1])).mean() + softplus(-d(r, r[:, :1])).mean(),
        lambda d, fake, _: -d(fake, labels=fake[:, :1]).mean(),
    ),
    "a keyword and an attribute": (
        lambda d, f, r: softplus(d(f, scale=d.gain)).mean() + softplus(-d(x=r, scale=0.5)).mean(),
        lambda d, fake, _: -d.forward(fake, scale=3.0).mean(),
    ),
    "a list is one argument": (
        lambda d, f, r: softplus(d([f, r])).mean() - d([r]).mean(),
        lambda d, fake, _: -d.forward([fake]).mean(),
    ),
}


def real_steps(
    d: nn.Module, game: Losses, fake: Tensor, real: Tensor, steps: int, lr: float
) -> Tensor:
    """Return f after real steps of SGD on a copy, with D itself as the objective's argument."""
    optimizer = torch.optim.SGD(d.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        game.discriminator_loss(d, fake.detach().requires_grad_(), real).backward()
        optimizer.step()
    with torch.no_grad():
        return game.generator_loss(d, fake, real)


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"average": True}], ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", GAMES)
def test_it_is_d_at_every_step(name: str, norm: bool, options: dict[str, Any]) -> None:
    game, d = Losses(*GAMES[name]), Featured(norm)
    real, fake = randn(5, 3), randn(5, 3).requires_grad_()
    loss = UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), 0.2), game, unroll_steps=3, **options
    )
    value = loss(fake, real)
    (gradient,) = torch.autograd.grad(value, fake)
    error = relative_error(lambda x: loss(x, real), fake.detach(), gradient)
    assert error < 1e-7, error
    assert all(p.grad is None for p in d.parameters())
    if not options.get("average"):
        f = real_steps(d, game, fake, real, 3, 0.2)
        torch.testing.assert_close(value.detach(), f, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("where", ["discriminator_loss", "generator_loss"])
def test_an_objective_that_closes_over_the_module_finds_it_at_every_step(where: str) -> None:
    d = Featured()
    given = Losses(_logistic, lambda d, fake, _: -d(fake).mean())
    own: Mapping[str, Any] = {
        "discriminator_loss": given.discriminator_loss,
        "generator_loss": given.generator_loss,
        where: lambda _, fake, real: getattr(given, where)(d, fake, real),
    }
    real, fake = randn(5, 3), randn(5, 3).requires_grad_()
    found = []
    for game in (given, Losses(**own)):
        optimizer = torch.optim.Adam(d.parameters(), 0.05)
        value = UnrolledGeneratorLoss(d, optimizer, game, unroll_steps=3)(fake, real)
        found.append((value.detach(), *torch.autograd.grad(value, fake)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert all(p.grad is None for p in d.parameters())


def _interpolating(d: Any, fake: Tensor, real: Tensor) -> Tensor:
    """A penalty between fakes and real samples that does not mark its points (as CTGAN's)."""
    between = 0.3 * real + 0.7 * fake
    (slope,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
    return _logistic(d, fake, real) + (slope.square().sum(1).sqrt() - 1).square().mean()


@pytest.mark.parametrize("how", ["stop_gradient", "no_grad", "unroll"])
def test_a_penalty_between_fakes_and_real_samples_works_wherever_it_is_called(how: str) -> None:
    d, game = Featured(), Losses(_interpolating, lambda d, fake, _: -d(fake).mean())
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    real, fake = randn(5, 3), randn(5, 3).requires_grad_()
    expected = UnrolledGeneratorLoss(d, optimizer, game, unroll_steps=2)(fake, real)
    loss = UnrolledGeneratorLoss(
        d, optimizer, game, unroll_steps=2, stop_gradient=how == "stop_gradient"
    )
    if how == "no_grad":
        with torch.no_grad():
            value = loss(fake, real)
    elif how == "unroll":
        value = -loss.unroll(fake.detach(), real)(fake).mean()
    else:
        value = loss(fake, real)
        (gradient,) = torch.autograd.grad(value, fake)
        theta = loss.unroll(fake.detach(), real).parameters
        x = fake.detach().requires_grad_()
        first = torch.autograd.grad(-functional_call(d, dict(theta), (x,)).mean(), x)[0]
        torch.testing.assert_close(gradient, first, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-12, atol=1e-15)


def test_two_functions_are_a_game_and_add_up_with_penalties() -> None:
    minimax = unroll.Minimax()
    game = Losses(minimax.discriminator_loss, minimax.generator_loss) + unroll.R1(0.5)
    d, real, fake = Featured(), randn(5, 3), randn(5, 3).requires_grad_()
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    values = [
        UnrolledGeneratorLoss(d, optimizer, objective, unroll_steps=2)(fake, real)
        for objective in (game, minimax + unroll.R1(0.5))
    ]
    assert torch.equal(*values)


def test_a_compiled_objective_that_uses_more_of_d_falls_back() -> None:
    d, game = Featured(), Losses(*GAMES["a regulariser over parameters()"])
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    real, fake = randn(5, 3), randn(5, 3).requires_grad_()
    plain = UnrolledGeneratorLoss(d, optimizer, game, unroll_steps=2)(fake, real)
    loss = UnrolledGeneratorLoss(d, optimizer, game, unroll_steps=2, compile=True)
    with pytest.warns(UserWarning, match="compile: the look-ahead runs uncompiled"):
        compiled = loss(fake, real)
    torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize(
    "options", [{}, {"checkpoint": True}, {"average": True}, {"stop_gradient": True}], ids=str
)
def test_the_losses_of_d_on_the_way_come_with_the_call(options: dict[str, Any]) -> None:
    d, real, fake = Featured(), randn(5, 3), randn(5, 3).requires_grad_()
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, **options)
    assert loss.discriminator_losses.shape == (0,)
    loss(fake, real).backward()
    assert torch.equal(loss.discriminator_losses, loss.unroll(fake, real).losses)
    assert loss.discriminator_losses.shape == (3,)
    assert not loss.discriminator_losses.requires_grad
    torch.testing.assert_close(
        loss.discriminator_losses[0], loss.discriminator_loss(fake, real).detach()
    )
    loss.unroll_steps = 0
    loss(fake, real)
    assert loss.discriminator_losses.shape == (0,)


class Annealed(nn.Module):
    """A D with a number that its objective sets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.alpha = nn.Linear(3, 1), 1.0
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x * self.alpha)
        return output


def _annealing(d: Any, fake: Tensor, real: Tensor) -> Tensor:
    d.alpha = 0.3
    loss = _logistic(d, fake, real)
    d.alpha = 1.0
    return loss


def test_an_objective_may_set_an_attribute_of_d() -> None:
    game = Losses(_annealing, lambda d, fake, _: -d(fake).mean())
    d, real, fake = Annealed(), randn(5, 3), randn(5, 3).requires_grad_()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.2), game, unroll_steps=3)
    wanted = real_steps(d, game, fake, real, 0, 0.2)
    assert loss.unroll(fake, real).losses[0] == game.discriminator_loss(d, fake, real)
    assert loss.discriminator_loss(fake, real) == game.discriminator_loss(d, fake, real)

    def sticking(d: Any, fake: Tensor, real: Tensor) -> Tensor:
        d.alpha = 0.5
        return _logistic(d, fake, real)

    stuck = Losses(sticking, game.generator_loss)
    UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.2), stuck, unroll_steps=1)(
        fake, real
    )
    assert d.alpha == 1.0
    assert real_steps(d, game, fake, real, 0, 0.2) == wanted
    value = loss(fake, real).detach()
    torch.testing.assert_close(value, real_steps(d, game, fake, real, 3, 0.2), rtol=1e-12, atol=0)


def _by_layers(d: Any, fake: Tensor, real: Tensor) -> Tensor:
    assert len(d) == len(list(d)) == 3
    loss: Tensor = (d[:-1](fake).mean(0) - d[:-1](real).mean(0)).square().sum() + d[2].bias.sum()
    return loss


def test_layers_of_a_sequential_d_are_to_be_had_by_number() -> None:
    d = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).to(DEVICE, torch.float64)
    game, real, fake = Losses(_logistic, _by_layers), randn(5, 3), randn(5, 3).requires_grad_()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.2), game, unroll_steps=3)
    value = loss(fake, real)
    (gradient,) = torch.autograd.grad(value, fake)
    assert relative_error(lambda x: loss(x, real), fake.detach(), gradient) < 1e-7
    torch.testing.assert_close(value.detach(), real_steps(d, game, fake, real, 3, 0.2))
