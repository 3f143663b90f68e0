"""Every animal of the zoo: exact gradients, the real step's parameters, nothing touched."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.checkpoint import checkpoint

from tests.players import batches, train
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from tests.zoo import ZOO, Animal, conv, mlp
from unroll import R1, Minimax, UnrolledGeneratorLoss


def sgd(d: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that the zoo is tried with."""
    return torch.optim.SGD(d.parameters(), lr=0.1)


def adam(d: nn.Module) -> torch.optim.Optimizer:
    """Return an Adam whose slope at small gradients central differences can follow."""
    return torch.optim.Adam(d.parameters(), lr=0.01, betas=(0.5, 0.9), eps=1e-3)


CASES = [(name, sgd) for name in ZOO] + [(name, adam) for name in ZOO if ZOO[name].adam]
IDS = [f"{name}-{optimizer.__name__}" for name, optimizer in CASES]


def housed(
    name: str, build: Callable[[nn.Module], Any]
) -> tuple[Animal, nn.Module, Any, Tensor, Tensor]:
    """Return an animal, its D, the optimizer after two real steps, fakes and reals."""
    animal = ZOO[name]
    d = animal.make()
    fake, real = randn(5, *animal.shape), randn(5, *animal.shape) + 0.5
    optimizer = build(d)
    pairs = [(animal.feed(randn(5, *animal.shape)), animal.feed(real)) for _ in range(2)]
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot do R1 in a real step
        train(d, optimizer, pairs, animal.objective)
    return animal, d, optimizer, fake, real


@pytest.mark.parametrize(("name", "build"), CASES, ids=IDS)
def test_the_gradient_is_exact(name: str, build: Callable[[nn.Module], Any]) -> None:
    """Central differences along random directions, under one seed for dropout's draws."""
    animal, d, optimizer, fake, real = housed(name, build)
    loss = UnrolledGeneratorLoss(d, optimizer, animal.objective, unroll_steps=animal.steps)
    before = snapshot(d, optimizer)

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        value: Tensor = loss(animal.feed(x), animal.feed(real))
        return value

    fake.requires_grad_()
    (gradient,) = torch.autograd.grad(f(fake), fake)
    directions = [randn(*fake.shape) for _ in range(4)]
    h = 1e-5
    wanted = torch.stack([(f(fake + h * v) - f(fake - h * v)) / (2 * h) for v in directions])
    got = torch.stack([(gradient * v).sum() for v in directions])
    error = ((got - wanted).norm() / wanted.norm()).item()
    assert error <= 1e-6, f"off by {error:.1e}"
    assert not changes(before, d, optimizer)


@pytest.mark.parametrize(("name", "build"), CASES, ids=IDS)
def test_the_steps_are_real(name: str, build: Callable[[nn.Module], Any]) -> None:
    """The look-ahead takes the steps of a copy whose power iterations stand still."""
    animal, d, optimizer, fake, real = housed(name, build)
    copied, copied_optimizer = _copied(name, build, d, optimizer)
    loss = UnrolledGeneratorLoss(d, optimizer, animal.objective, unroll_steps=animal.steps)
    torch.manual_seed(1)
    fake.requires_grad_()
    ahead = loss.unroll(animal.feed(fake), animal.feed(real))
    torch.manual_seed(1)
    pairs = [(animal.feed(fake.detach()), animal.feed(real))] * animal.steps
    with sdpa_kernel(SDPBackend.MATH):
        train(copied, copied_optimizer, pairs, animal.objective)
    wanted = dict(copied.named_parameters())
    assert list(ahead.parameters) == list(wanted)
    moved = False
    for parameter_name, parameter in wanted.items():
        got = ahead.parameters[parameter_name]
        error = (got - parameter).norm() / parameter.norm().clamp_min(1e-3)
        assert error <= 1e-12, f"{parameter_name}: off by {error:.1e}"
        moved |= not torch.equal(parameter, dict(d.named_parameters())[parameter_name])
    assert moved
    for buffer_name, buffer in copied.named_buffers():
        torch.testing.assert_close(ahead.buffers[buffer_name], buffer, rtol=1e-12, atol=1e-12)


def _copied(
    name: str, build: Callable[[nn.Module], Any], d: nn.Module, optimizer: Any
) -> tuple[nn.Module, Any]:
    copied = ZOO[name].make()
    copied.load_state_dict(d.state_dict())
    for mine, original in zip(copied.modules(), d.modules(), strict=True):
        mine.train(original.training)
    for module in copied.modules():
        if isinstance(module, _SpectralNorm):
            module.eval()
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                hook.n_power_iterations = 0
    copied_optimizer = build(copied)
    copied_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return copied, copied_optimizer


class Checkpointed(nn.Module):
    """Activation checkpointing inside D, of its first layers or of its middle."""

    def __init__(self, *, reentrant: bool, first: bool = False) -> None:
        super().__init__()
        self.reentrant, self.first = reentrant, first
        self.before, self.body = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 1)
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else self.before(x)
        hidden = checkpoint(self.body, x, use_reentrant=self.reentrant)
        output: Tensor = self.head(hidden)
        return output


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = 2 * x * grad
        return slope


class Fused(nn.Module):
    """A layer like a fused kernel: its gradient has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _Once.apply(x)
        return output


def _d64(d: nn.Module) -> nn.Module:
    return d.to(DEVICE, torch.float64)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "BatchNorm1d + R1": (
        lambda: _d64(mlp(nn.BatchNorm1d(6))),
        Minimax() + R1(1.0),
        r"discriminator: .*derivative.*\b1 \(BatchNorm1d\).*GroupNorm",
    ),
    "BatchNorm2d + R1": (
        lambda: _d64(conv(nn.BatchNorm2d(4))),
        Minimax() + R1(1.0),
        r"discriminator: .*derivative.*\b1 \(BatchNorm2d\).*GroupNorm",
    ),
    "InstanceNorm2d + R1": (
        lambda: _d64(conv(nn.InstanceNorm2d(4))),
        Minimax() + R1(1.0),
        r"discriminator: .*derivative.*\b1 \(InstanceNorm2d\).*GroupNorm",
    ),
    "fused layer": (
        lambda: _d64(mlp(Fused())),
        Minimax(),
        r"discriminator: .*derivative.*\b1 \(Fused\).*stop_gradient=True",
    ),
    "activation checkpointing": (
        lambda: Checkpointed(reentrant=False),
        Minimax(),
        r"discriminator: activation checkpointing.*Switch torch\.utils\.checkpoint off",
    ),
    "activation checkpointing, reentrant": (
        lambda: Checkpointed(reentrant=True),
        Minimax(),
        r"(?i)checkpoint",
    ),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str) -> None:
    build, objective, message = REFUSED[kind]
    d = build()
    optimizer = sgd(d)
    if "Norm2d" in kind:
        fake, real = randn(5, 2, 6, 6), randn(5, 2, 6, 6)
    else:
        ((fake, real),) = batches(1)
    loss = UnrolledGeneratorLoss(d, optimizer, objective, unroll_steps=3)
    before = snapshot(d, optimizer)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(RuntimeError, match=message):
            loss(fake.clone().requires_grad_(), real)
    assert not changes(before, d, optimizer)


@pytest.mark.parametrize("kind", ["BatchNorm1d + R1", "fused layer"])
def test_refused_layers_work_with_the_first_term_alone(kind: str) -> None:
    """The way out that the message names."""
    build, objective, _ = REFUSED[kind]
    d = build()
    ((fake, real),) = batches(1)
    loss = UnrolledGeneratorLoss(d, sgd(d), objective, unroll_steps=3, stop_gradient=True)
    fake.requires_grad_()
    loss(fake, real).backward()
    assert fake.grad is not None
    assert fake.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("first", [False, True], ids=["middle", "first"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("options", [(0, False), (2, True), (2, False)], ids=str)
def test_activation_checkpointing_is_right_or_refused(
    options: tuple[int, bool], reentrant: bool, first: bool
) -> None:
    """Never silently wrong, and never a gradient in D: also without a second term."""
    k, stop_gradient = options
    d = Checkpointed(reentrant=reentrant, first=first)
    plain = Checkpointed(reentrant=reentrant, first=first)
    plain.load_state_dict(d.state_dict())
    ((fake, real),) = batches(1)
    got, wanted = fake.clone().requires_grad_(), fake.clone().requires_grad_()
    loss = UnrolledGeneratorLoss(d, sgd(d), unroll_steps=k, stop_gradient=stop_gradient)
    before = snapshot(d)
    try:
        loss(got, real).backward()
    except RuntimeError as error:
        assert "discriminator: activation checkpointing" in str(error)
    else:
        plain.forward = lambda x: plain.head(plain.body(x if first else plain.before(x)))  # type: ignore[method-assign]
        loss = UnrolledGeneratorLoss(plain, sgd(plain), unroll_steps=k, stop_gradient=stop_gradient)
        loss(wanted, real).backward()
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-12, atol=0)
    assert not changes(before, d)
