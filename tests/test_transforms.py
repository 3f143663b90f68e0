"""``transform_gradients=`` against real steps that clip, and against central differences."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import unroll
from tests.oracles import relative_error
from tests.players import batches, called, small
from tests.settings import DEVICE, randn
from unroll import ClipGradNorm, ClipGradValue, UnrolledGeneratorLoss

Gradients = Mapping[str, Tensor]
GAME = unroll.Minimax()

# The transform, what the loop does between backward() and step(), and whether it takes effect.
CLIPS: dict[str, tuple[Callable[[Gradients], Gradients], Callable[[nn.Module], Any]]] = {
    "norm": (ClipGradNorm(0.1), lambda d: nn.utils.clip_grad_norm_(d.parameters(), 0.1)),
    "norm 1": (
        ClipGradNorm(0.3, norm_type=1.0),
        lambda d: nn.utils.clip_grad_norm_(d.parameters(), 0.3, norm_type=1.0),
    ),
    "largest": (
        ClipGradNorm(0.05, norm_type=float("inf")),
        lambda d: nn.utils.clip_grad_norm_(d.parameters(), 0.05, norm_type=float("inf")),
    ),
    "norm never reached": (
        ClipGradNorm(1e3),
        lambda d: nn.utils.clip_grad_norm_(d.parameters(), 1e3),
    ),
    "value": (ClipGradValue(0.05), lambda d: nn.utils.clip_grad_value_(d.parameters(), 0.05)),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda d: torch.optim.SGD(d.parameters(), lr=0.2, momentum=0.9),
    "Adam": lambda d: torch.optim.Adam(d.parameters(), lr=0.02, eps=1e-3),
    "torchopt": lambda d: torchopt.Adam(d.parameters(), lr=0.02, eps=1e-3, eps_root=1e-8),
}


def step(d: nn.Module, optimizer: Any, pair: tuple[Tensor, Tensor], clip: Any) -> None:
    """Take a training step of D that clips."""
    optimizer.zero_grad()
    GAME.discriminator_loss(called(d), *pair).backward()
    clip(d)
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", CLIPS)
def test_equals_real_steps_that_clip(clip: str, optimizer: str) -> None:
    transform, really = CLIPS[clip]
    d = small()
    trained = OPTIMIZERS[optimizer](d)
    for pair in batches(2, seed=1):
        step(d, trained, pair, really)
    loss = UnrolledGeneratorLoss(d, trained, GAME, unroll_steps=3, transform_gradients=transform)
    (pair,) = batches(1, seed=2)
    ahead = loss.unroll(*pair)
    unclipped = UnrolledGeneratorLoss(d, trained, GAME, unroll_steps=3).unroll(*pair)
    start = {name: p.detach().clone() for name, p in d.named_parameters()}
    for _ in range(3):
        step(d, trained, pair, really)
    for name, p in d.named_parameters():
        torch.testing.assert_close(ahead.parameters[name], p, rtol=1e-12, atol=1e-14)
    moved = any(not torch.equal(unclipped.parameters[n], p) for n, p in ahead.parameters.items())
    assert moved == (clip != "norm never reached")
    assert any(not torch.equal(start[n], p) for n, p in d.named_parameters())


OPTIONS: list[dict[str, Any]] = [
    {"checkpoint": True},
    {"average": True},
    {"project": lambda theta: {n: torch.tanh(p) for n, p in theta.items()}},
]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [*((name, {}) for name in OPTIMIZERS), *(("Adam", options) for options in OPTIONS)],
    ids=lambda given: given if isinstance(given, str) else next(iter(given), "plain"),
)
@pytest.mark.parametrize("clip", CLIPS)
def test_is_differentiated_through(clip: str, optimizer: str, options: dict[str, Any]) -> None:
    d = small()
    trained = OPTIMIZERS[optimizer](d)
    step(d, trained, batches(1, seed=1)[0], CLIPS[clip][1])
    loss = UnrolledGeneratorLoss(
        d, trained, GAME, unroll_steps=3, transform_gradients=CLIPS[clip][0], **options
    )
    ((fake, real),) = batches(1, seed=2)
    fake.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(fake, real), fake)
    error = relative_error(lambda x: loss(x, real), fake.detach(), gradient)
    assert error < 1e-7, error


def test_the_terms_of_the_gradient_follow_it() -> None:
    d, g = small(), nn.Linear(4, 4).to(DEVICE).double()
    loss = UnrolledGeneratorLoss(
        *(d, OPTIMIZERS["Adam"](d), GAME), unroll_steps=2, transform_gradients=ClipGradNorm(0.1)
    )
    ((z, real),) = batches(1)
    first, second = unroll.gradient_terms(loss, g(z), real, g.parameters())
    found = torch.autograd.grad(loss(g(z), real), list(g.parameters()))
    for a, b, c in zip(first, second, found, strict=True):
        torch.testing.assert_close(a + b, c)
    assert unroll.check_gradients(loss, z, real).ok


def test_clipping_that_detaches_its_norm_is_found() -> None:
    def clip(gradients: Gradients) -> Gradients:
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        return {n: 0.1 * g / norm.detach() for n, g in gradients.items()}

    d = small()
    optimizer = torch.optim.SGD(d.parameters(), 0.5)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, transform_gradients=clip)
    report = unroll.check_gradients(loss, *batches(1)[0])
    assert not report.ok


def _in_place(gradients: Gradients) -> Gradients:
    for g in gradients.values():
        g.clamp_(-0.05, 0.05)
    return gradients


def test_it_may_write_in_place() -> None:
    found = []
    for transform in (_in_place, ClipGradValue(0.05)):
        torch.manual_seed(0)
        d = small()
        optimizer = torch.optim.SGD(d.parameters(), 0.5)
        loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, transform_gradients=transform)
        ((fake, real),) = batches(1)
        fake.requires_grad_()
        found.append(torch.autograd.grad(loss(fake, real), fake)[0])
    assert torch.equal(*found)


def test_it_sees_the_gradients_that_there_are() -> None:
    seen: list[set[str]] = []

    def note(gradients: Gradients) -> Gradients:
        seen.append(set(gradients))
        return gradients

    d = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DEVICE).double()
    d.register_parameter("unused", nn.Parameter(randn(2)))
    d[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(d.parameters(), 0.5)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, transform_gradients=note)
    loss(randn(5, 3).requires_grad_(), randn(5, 3))
    assert seen
    assert all(names == {"0.weight", "2.weight", "2.bias"} for names in seen)
