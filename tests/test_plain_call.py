"""How much of the library a plain call goes through, and what its first call looks for."""

import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import unroll
from tests.players import batches, deep, small
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from unroll import UnrolledGeneratorLoss


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


@pytest.mark.plain
def test_a_plain_call_passes_few_files_and_functions() -> None:
    d, ((fake, real),) = deep(), batches(1)
    optimizer = torch.optim.Adam(d.parameters())
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
    loss(leaf(fake), real)
    passed: set[tuple[str, str, int]] = set()
    package = str(Path(unroll.__file__).parent)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            passed.add((code.co_filename, code.co_name, code.co_firstlineno))

    fake = leaf(fake)
    sys.setprofile(profile)
    try:
        loss(fake, real)
    finally:
        sys.setprofile(None)
    functions = {
        p for p in passed if p[1] not in ("<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")
    }
    assert len({file for file, _, _ in passed}) <= 9
    assert len(functions) <= 80, sorted(functions)


@pytest.mark.plain
def test_the_first_call_of_every_form_of_d_takes_two_steps_more() -> None:
    ((fake, real),) = batches(1)
    d = nn.Sequential(small(), nn.Dropout(0.1))
    calls: list[bool] = []

    def count(*_: Any) -> None:
        calls.append(True)

    d.register_forward_hook(count)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)

    def evaluations() -> int:
        before = len(calls)
        loss(leaf(fake), real)
        return len(calls) - before

    plain = 2 * 2 + 2
    searched = 2 * (2 + 2)  # for graphs, and for constants: a step and f
    assert evaluations() == plain + searched
    assert evaluations() == plain
    d.eval()
    assert evaluations() == plain + searched
    d.train()
    assert evaluations() == plain
    d[1] = nn.Identity()
    assert evaluations() == plain + searched
    loss.unroll_steps = 0
    assert evaluations() == 2 + 2
    assert evaluations() == 2


class _Once(torch.autograd.Function):
    """The identity, with a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


class Once(nn.Module):
    """A layer without a second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _Once.apply(x)
        return output


def test_a_layer_that_comes_later_is_looked_at_too() -> None:
    d = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DEVICE).double()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)
    loss(leaf(randn(5, 3)), randn(5, 3))
    d.insert(1, Once())
    with pytest.raises(RuntimeError, match=r"a derivative that PyTorch .* 1 \(Once\)"):
        loss(leaf(randn(5, 3)), randn(5, 3))


class Checkpointing(nn.Module):
    """A D that keeps no activations of its middle, as torch's own function has it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.head, self.saves = nn.Linear(3, 8), nn.Linear(8, 1), True
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.reentrant = reentrant
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.saves:
            x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        else:
            x = self.middle(x)
        output: Tensor = self.head(torch.tanh(x))
        return output


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_activation_checkpointing_in_d_is_right_without_steps(
    reentrant: bool, frozen: bool
) -> None:
    d = Checkpointing(reentrant).requires_grad_(not frozen)
    optimizer = torch.optim.Adam(d.parameters())
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=0)
    fake, real, found = randn(6, 3), randn(6, 3), []
    for saves in (True, True, False):
        d.saves = saves
        before = snapshot(d, optimizer)
        torch.manual_seed(1)
        x = leaf(fake)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reentrant form: none of its inputs needs one
            value = loss(x, real)
            (3 * value).backward()
        assert x.grad is not None
        found.append((value.detach(), x.grad))
        assert not changes(before, d, optimizer)
    d.saves, x = True, leaf(fake)
    message = r"^discriminator: f_K has first derivatives only.*Switch torch\.utils\.checkpoint off"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = loss(x, real)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(value, x, create_graph=True)
    for value, gradient in found[:2]:
        assert torch.equal(value, found[2][0])
        torch.testing.assert_close(gradient, found[2][1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"stop_gradient": True}])
def test_activation_checkpointing_in_d_is_refused_with_steps(
    reentrant: bool, options: dict[str, Any]
) -> None:
    d = Checkpointing(reentrant)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1, **options)
    message = r"^discriminator: activation checkpointing.*Switch torch\.utils\.checkpoint off"
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=message):
        warnings.simplefilter("ignore")
        loss(leaf(randn(6, 3)), randn(6, 3))


class Frozen(dict[str, Any]):
    """A dict that refuses changes, as the configurations of model libraries are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.closed = True

    def clear(self) -> None:
        raise TypeError("closed")

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("closed")


class Keeping(nn.Module):
    """A D with a configuration, a vocabulary, and lists that its forward pass fills."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.vocabulary = Frozen(width=3), {str(i): i for i in range(100_000)}
        self.features: list[Tensor] = []
        self.counts, self.direction = {"calls": 0}, randn(3)
        self.layer = nn.Linear(3, 1)
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.features.append(x)
        self.counts["calls"] += 1
        self.direction.mul_(0.5)
        output: Tensor = self.layer(x) + self.direction.sum().item()
        return output


@pytest.mark.plain
def test_what_d_fills_is_given_back_and_what_refuses_is_not_touched() -> None:
    d = Keeping()
    config, vocabulary = d.config, d.vocabulary
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)
    before = snapshot(d)
    for _ in range(2):
        loss(leaf(randn(4, 3)), randn(4, 3)).backward()
        assert not changes(before, d)
    assert d.config is config
    assert config == {"width": 3}
    assert d.vocabulary is vocabulary


def test_what_is_printed_of_a_look_ahead_is_a_line() -> None:
    d = deep()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)
    ahead = loss.unroll(*batches(1)[0])
    text = repr(ahead)
    assert len(text) < 120
    assert "\n" not in text
    assert f"{ahead.losses[1]:.4g}" in text
