"""What an optimizer trains beside D's parameters, and settings that are differentiated."""

from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from tests.oracles import central_difference
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from tests.test_compile import as_it_is
from unroll import Minimax, UnrolledGeneratorLoss
from unroll._modes import backend


class Listed(nn.Module):
    """A D with layers in a plain list, whose parameters the optimizer was given by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Linear(3, 8), nn.Linear(8, 8)]
        self.head = nn.Linear(8, 1)
        for layer in (*self.blocks, self.head):
            layer.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        output: Tensor = self.head(x)
        return output


class Tempered(Minimax):
    """A game with a temperature that D's optimizer learns."""

    def __init__(self) -> None:
        object.__setattr__(self, "temperature", randn(1).requires_grad_())

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        temperature: Tensor = vars(self)["temperature"]
        return super().discriminator_loss(lambda x: temperature * discriminator(x), fake, real)


def head() -> nn.Module:
    return nn.Linear(3, 1).to(DEVICE, torch.float64)


def listed() -> tuple[nn.Module, list[Tensor], Minimax]:
    d = Listed()
    return d, [*d.parameters(), *(p for b in d.blocks for p in b.parameters())], Minimax()


def tempered() -> tuple[nn.Module, list[Tensor], Minimax]:
    d, game = head(), Tempered()
    return d, [*d.parameters(), vars(game)["temperature"]], game


def encoded() -> tuple[nn.Module, list[Tensor], Minimax]:
    """Return a game whose D looks at what a layer outside of it makes of its samples."""
    d, encoder = head(), nn.Linear(3, 3).to(DEVICE, torch.float64)

    class Encoded(Minimax):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            return super().discriminator_loss(lambda x: discriminator(encoder(x)), fake, real)

    return d, [*d.parameters(), *encoder.parameters()], Encoded()


@pytest.mark.parametrize("make", [listed, tempered, encoded])
@pytest.mark.parametrize("build", [torch.optim.Adam, torchopt.Adam])
def test_what_the_optimizer_trains_and_d_uses_must_be_in_d(make: Any, build: Any) -> None:
    d, trained, game = make()
    optimizer = build(trained, lr=0.1)
    loss = UnrolledGeneratorLoss(d, optimizer, game, unroll_steps=2)
    before = snapshot(d, optimizer)
    message = r"^discriminator: the optimizer trains tensors .*\(shapes \(.*Register them"
    with pytest.raises(RuntimeError, match=message):
        loss(randn(5, 3).requires_grad_(), randn(5, 3))
    assert not changes(before, d, optimizer)
    loss.unroll_steps = 0  # f_0 needs no step
    loss(randn(5, 3).requires_grad_(), randn(5, 3))


def test_what_the_optimizer_trains_beside_d_is_no_mistake() -> None:
    """An encoder whose outputs are in the batch, and what the loss does not use."""
    d, encoder = head(), nn.Linear(3, 3).to(DEVICE, torch.float64)
    unused = randn(4).requires_grad_()
    optimizer = torch.optim.Adam([*d.parameters(), *encoder.parameters(), unused])
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    loss(randn(5, 3).requires_grad_(), encoder(randn(5, 3))).backward()
    assert encoder.weight.grad is not None


SETTINGS: dict[str, Any] = {
    "SGD": lambda d, lr: torch.optim.SGD(d.parameters(), lr=lr),
    "SGD momentum": lambda d, lr: torch.optim.SGD(d.parameters(), lr=lr, momentum=0.9),
    "Adam": lambda d, lr: torch.optim.Adam(d.parameters(), lr=lr),
    "AdamW": lambda d, lr: torch.optim.AdamW(d.parameters(), lr=lr, weight_decay=0.1),
    "RMSprop": lambda d, lr: torch.optim.RMSprop(d.parameters(), lr=lr),
    "torchopt.sgd": lambda _, lr: torchopt.sgd(lr),
}


@pytest.mark.plain
@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"compile": True}])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_learning_rate_gets_its_gradient(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "generated", as_it_is)
    if name.startswith("torchopt") and options.get("checkpoint"):
        pytest.xfail("torchopt keeps it in a closure, which a recomputed step refuses by name")
    d = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE, torch.float64)
    fake, real = randn(5, 3).requires_grad_(), randn(5, 3)

    def f(lr: Tensor, **options: Any) -> Tensor:
        optimizer = SETTINGS[name](d, lr)
        loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, **options)
        value: Tensor = loss(fake, real)
        return value

    lr = torch.tensor(0.1, dtype=torch.float64, device=DEVICE, requires_grad=True)
    if options.get("compile"):
        torch._dynamo.reset()
    (gradient,) = torch.autograd.grad(f(lr, **options), lr)
    difference = central_difference(lambda t: f((lr + t).detach()).item())
    assert abs(gradient.item() - difference) <= 1e-8 * abs(difference)
