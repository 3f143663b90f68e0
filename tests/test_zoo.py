"""Every animal of the zoo: exact gradients, the real step's parameters, nothing touched."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from tests.oracles import plain_difference, relative_error
from tests.players import batches, train
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from tests.zoo import ZOO, Animal
from tests.zoo_layers import mlp
from tests.zoo_refused import REFUSED, Checkpointed
from unroll import UnrolledGeneratorLoss


def sgd(d: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that the zoo is tried with."""
    return torch.optim.SGD(d.parameters(), lr=0.1)


def adam(d: nn.Module) -> torch.optim.Optimizer:
    """Return an Adam whose slope at small gradients central differences can follow."""
    return torch.optim.Adam(d.parameters(), lr=0.01, betas=(0.5, 0.9), eps=1e-3)


CASES = [(name, sgd) for name in ZOO] + [(name, adam) for name in ZOO if ZOO[name].adam]
IDS = [f"{name}-{build.__name__}" for name, build in CASES]


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
    error = relative_error(f, fake.detach(), gradient, 4, plain_difference)
    assert error <= 5e-7, f"off by {error:.1e}"
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
    wanted, start = (dict(unwrapped(module).named_parameters()) for module in (copied, d))
    assert list(ahead.parameters) == list(wanted)
    moved = False
    for parameter_name, parameter in wanted.items():
        got = ahead.parameters[parameter_name]
        error = (got - parameter).norm() / parameter.norm().clamp_min(1e-3)
        assert error <= 1e-12, f"{parameter_name}: off by {error:.1e}"
        moved |= not torch.equal(parameter, start[parameter_name])
    assert moved
    for buffer_name, buffer in unwrapped(copied).named_buffers():
        torch.testing.assert_close(ahead.buffers[buffer_name], buffer, rtol=1e-12, atol=1e-12)


def unwrapped(d: nn.Module) -> nn.Module:
    """Return the module whose names the look-ahead uses."""
    inner = d.module if isinstance(d, nn.DataParallel) else getattr(d, "_orig_mod", d)
    assert isinstance(inner, nn.Module)
    return inner


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


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str) -> None:
    refusal = REFUSED[kind]
    d = refusal.make()
    optimizer = torch.optim.SGD(list(d.parameters()) or [randn(1)], lr=0.1)
    fake, real = randn(5, *refusal.shape).requires_grad_(), randn(5, *refusal.shape)
    loss: UnrolledGeneratorLoss | None = None
    before = snapshot(d, optimizer)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(refusal.error, match=refusal.message):
            loss = loss or UnrolledGeneratorLoss(d, optimizer, refusal.objective, unroll_steps=3)
            loss(refusal.feed(fake), refusal.feed(real))
    assert not changes(before, d, optimizer)


def test_a_refused_layer_works_with_the_first_term_alone() -> None:
    """The way out that the message names."""
    refusal = REFUSED["fused layer"]
    d = refusal.make()
    ((fake, real),) = batches(1)
    loss = UnrolledGeneratorLoss(d, sgd(d), refusal.objective, unroll_steps=3, stop_gradient=True)
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
    d = Checkpointed(reentrant=reentrant, first=first).to(DEVICE, torch.float64)
    plain = Checkpointed(reentrant=reentrant, first=first).to(DEVICE, torch.float64)
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


class Quantised(nn.Module):
    """A quantised branch, whose rounding has no derivative, beside one in floating point."""

    def __init__(self) -> None:
        super().__init__()
        branch = nn.Sequential(nn.Linear(4, 4))
        self.branch = torch.ao.quantization.quantize_dynamic(branch, {nn.Linear})
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = (torch.tanh(self.body(x)) + self.branch(x)).sum(1)
        return output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("everything", [False, True])
def test_quantised_layers_are_refused_by_name(everything: bool) -> None:
    d = Quantised().branch if everything else Quantised()
    optimizer = torch.optim.SGD(list(d.parameters()) or [randn(1)], lr=0.1)
    with pytest.raises(TypeError, match=r"discriminator: .*quantised.*before"):
        UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)


def test_the_refusal_of_synchronised_batch_norm_passes_through(tmp_path: Path) -> None:
    """Among several processes it runs on accelerators only, and PyTorch says so."""
    d = mlp(nn.SyncBatchNorm(6)).double()
    optimizer = sgd(d)
    fake, real = randn(5, 4).cpu().requires_grad_(), randn(5, 4).cpu()
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    before = snapshot(d, optimizer)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            loss(fake, real)
    finally:
        distributed.destroy_process_group()
    assert not changes(before, d, optimizer)


@pytest.mark.parametrize(
    "name", ["tanh", "BatchNorm1d", "spectral norm", "attributes set by forward"]
)
def test_a_discriminator_that_the_generators_other_losses_use_too(name: str) -> None:
    """Feature matching through the real D in the same graph: gradients add up, on both sides."""
    animal, d, optimizer, fake, real = housed(name, adam)
    loss = UnrolledGeneratorLoss(d, optimizer, animal.objective, unroll_steps=3)
    optimizer.zero_grad()
    d.eval()  # a forward pass of one's own then leaves the buffers alone
    generator = nn.Linear(4, 4).to(fake)

    def matching(x: Tensor) -> Tensor:
        value: Tensor = (d(x).mean() - d(real).mean()).square()
        return value

    def gradients(*terms: Callable[[Tensor], Tensor]) -> tuple[list[Any], list[Any]]:
        x = generator(fake)
        torch.stack([term(x) for term in terms]).sum().backward()
        found = [[p.grad for p in module.parameters()] for module in (generator, d)]
        for module in (generator, d):
            module.zero_grad()
        return found[0], found[1]

    alone, untouched = gradients(lambda x: loss(x, real))
    assert untouched == [None] * len(untouched)
    other, of_d = gradients(matching)
    for terms in ([matching, lambda x: loss(x, real)], [lambda x: loss(x, real), matching]):
        total, of_d_too = gradients(*terms)
        for a, b, c in zip(alone, other, total, strict=True):
            torch.testing.assert_close(a + b, c, rtol=1e-12, atol=1e-15)
        for a, b in zip(of_d, of_d_too, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("name", ["tanh", "GroupNorm", "LayerNorm", "attention, weights", "GRU"])
def test_the_steps_are_real_in_lower_precision(name: str, dtype: torch.dtype, bound: float) -> None:
    """The K steps of D in its own precision, to that precision; the gradient is finite.

    In float32, where D's parameters are large beside its update, two orders of summation may differ
    by more than ``bound``: by half of what the real steps themselves round off at most.
    """
    animal = ZOO[name]
    d = animal.make().to(dtype)
    exact = copy.deepcopy(d).double()
    fake, real = (randn(5, *animal.shape).to(dtype) for _ in range(2))
    optimizer = sgd(d)
    loss = UnrolledGeneratorLoss(d, optimizer, animal.objective, unroll_steps=3)
    fake.requires_grad_()
    ahead = loss.unroll(fake, real)
    (gradient,) = torch.autograd.grad(loss(fake, real), fake)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    start = {name: p.detach().clone() for name, p in d.named_parameters()}
    train(d, optimizer, [(fake.detach(), real)] * 3, animal.objective)
    wanted = torch.cat([(p - start[n]).flatten() for n, p in d.named_parameters()])
    train(exact, sgd(exact), [(fake.detach().double(), real.double())] * 3, animal.objective)
    precise = torch.cat([(p - start[n]).flatten() for n, p in exact.named_parameters()])
    rounded = (wanted - precise).norm() if dtype == torch.float32 else torch.zeros(())
    assert rounded <= 1e-4 * precise.norm()
    got = torch.cat([(ahead.parameters[n] - start[n]).flatten() for n in start])
    assert ahead.parameters.keys() == start.keys()
    assert (got - wanted).norm() <= max(bound * wanted.norm(), 0.5 * rounded)
