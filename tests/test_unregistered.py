"""What an optimizer trains beside D's parameters, and settings that are differentiated."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from tests.oracles import central_difference
from tests.players import train
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


class Buffered(nn.Module):
    """A D that keeps what is trained in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("scale", torch.ones(3))
        self.to(DEVICE, torch.float64)
        self.get_buffer("scale").requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x * self.get_buffer("scale"))
        return output


def buffered() -> tuple[nn.Module, list[Tensor], Minimax]:
    d = Buffered()
    return d, [*d.parameters(), *d.buffers()], Minimax()


@pytest.mark.parametrize("make", [listed, tempered, encoded, buffered])
@pytest.mark.parametrize("build", [torch.optim.Adam, torchopt.Adam])
def test_what_the_optimizer_trains_and_d_uses_must_be_in_d(make: Any, build: Any) -> None:
    d, trained, game = make()
    optimizer = build(trained, lr=0.1)
    before = snapshot(d, optimizer)
    message = r"^discriminator: the optimizer trains tensors .*\(shapes \(.*Register them"
    for stop_gradient in (False, True):
        options: dict[str, Any] = {"unroll_steps": 2, "stop_gradient": stop_gradient}
        loss = UnrolledGeneratorLoss(d, optimizer, game, **options)
        with pytest.raises(RuntimeError, match=message):
            loss(randn(5, 3).requires_grad_(), randn(5, 3))
        with pytest.raises(RuntimeError, match=message):
            loss.unroll(randn(5, 3), randn(5, 3))
        if make is not tempered:  # an objective's own tensors are constants there
            with torch.no_grad(), pytest.raises(RuntimeError, match=message):
                loss(randn(5, 3), randn(5, 3))
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


@pytest.fixture
def _double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.plain
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("build", "key", "number"),
    [
        (torch.optim.ASGD, "lr", 0.3),
        (torch.optim.ASGD, "lambd", 0.1),
        (torch.optim.ASGD, "alpha", 0.75),
        (torch.optim.NAdam, "momentum_decay", 0.4),
        (torch.optim.NAdam, "betas", 0.9),
    ],
)
@pytest.mark.usefixtures("_double_by_default")
def test_a_setting_in_a_number_of_the_state_gets_its_gradient(
    build: Any, key: str, number: float, checkpoint: bool
) -> None:
    """ASGD's rates and NAdam's product of momenta, which torch rounds to its default type."""
    d = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE)
    optimizer = build(d.parameters(), lr=0.1)
    train(d, optimizer, [(randn(5, 3), randn(5, 3))])
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, checkpoint=checkpoint)
    fake, real = randn(5, 3).requires_grad_(), randn(5, 3)

    def f(setting: Any) -> Tensor:
        optimizer.param_groups[0][key] = (setting, 0.999) if key == "betas" else setting
        value: Tensor = loss(fake, real)
        return value

    setting = torch.tensor(number, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(f(setting), setting)
    difference = central_difference(lambda t: f((setting + t).detach()).item())
    assert abs(gradient.item() - difference) <= 1e-7 * abs(difference)
    states = []
    for given in (setting, number):
        f(given)
        states.append(loss.unroll(fake, real).optimizer_state)
    for entries, wanted in zip(*(state.values() for state in states), strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(torch.as_tensor(entries[name]), torch.as_tensor(value))
