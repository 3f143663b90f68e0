"""One GAN loop, by itself and with what a framework puts in the place of its parts."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.test_live import assert_close
from unroll import Criterion, UnrolledGeneratorLoss, check_step

STEPS = 3  # of the loop, and of the look-ahead
SAMPLES = 32  # of all ranks together


@dataclass
class Parts:
    """What a loop is made of; the same at every call."""

    generator: nn.Module
    discriminator: nn.Module
    g_optimizer: torch.optim.Optimizer
    d_optimizer: torch.optim.Optimizer
    noise: Tensor
    real: Tensor

    @classmethod
    def of_rank(cls, rank: int, world: int, dtype: torch.dtype = torch.float64) -> "Parts":
        """Return the players, and a rank's share of the samples."""
        torch.manual_seed(0)
        g = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        d = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).to(dtype)
        g_optimizer, d_optimizer = (
            torch.optim.Adam(p.parameters(), lr=0.01, eps=1e-3) for p in (g, d)
        )
        noise, real = (
            torch.randn(SAMPLES, size, dtype=dtype).chunk(world)[rank] for size in (4, 2)
        )
        return cls(g, d, g_optimizer, d_optimizer, noise, real)


class Mixed(nn.Module):
    """What mixed precision is in a framework: autocast inside of a module, and float32 out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output: Tensor = self.module(x)
        return output.float()


@dataclass
class Found:
    """What came of a loop."""

    gradients: dict[str, Tensor]  # of the generator, in the last step
    sync: bool
    verdict: str
    ahead: dict[str, Tensor]  # D's parameters after the look-ahead
    trained: dict[str, Tensor]  # after as many real steps from the same point


def train(
    parts: Parts,
    backward: Callable[[Tensor], Any] = torch.autograd.backward,
    turn: Callable[[Any], AbstractContextManager[Any]] = lambda _: nullcontext(),
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **options: Any,
) -> Found:
    """Run the loop; ``turn`` is around what is done with an optimizer."""
    g, g_optimizer, d_optimizer = parts.generator, parts.g_optimizer, parts.d_optimizer
    unrolled = UnrolledGeneratorLoss(
        parts.discriminator,
        d_optimizer,
        Criterion(nn.BCEWithLogitsLoss()),
        unroll_steps=STEPS,
        **options,
    )

    def train_discriminator(fake: Any, real: Any) -> None:
        with turn(d_optimizer):
            d_optimizer.zero_grad()
            backward(unrolled.discriminator_loss(fake, real))
            d_optimizer.step()

    for _ in range(STEPS):
        fake = g(parts.noise)
        train_discriminator(fake, parts.real)
        with turn(g_optimizer):
            g_optimizer.zero_grad()
            with autocast():
                loss = unrolled(fake, parts.real)
            backward(loss)
            gradients = {n: p.grad.clone() for n, p in g.named_parameters() if p.grad is not None}
            g_optimizer.step()

    fake = g(parts.noise).detach()
    with autocast():
        ahead = unrolled.unroll(fake, parts.real).parameters
        report = check_step(unrolled, train_discriminator, fake, parts.real)
    for _ in range(STEPS):
        train_discriminator(fake, parts.real)
    trained = {n: p.detach().clone() for n, p in unrolled.discriminator.named_parameters()}
    ahead = {n: p.detach() for n, p in ahead.items()}
    return Found(gradients, unrolled.sync, report.verdict, ahead, trained)


def plain(dtype: torch.dtype = torch.float64, *, mixed: bool = False) -> Found:
    """Return what the loop finds without any framework, in one process."""
    parts = Parts.of_rank(0, 1, dtype)
    if mixed:
        parts.generator, parts.discriminator = map(Mixed, (parts.generator, parts.discriminator))
    return train(parts)


def assert_same(found: Found, wanted: Found, tolerance: float) -> None:
    """Compare what a framework's loop found with the plain loop's; 0.0: bit for bit."""
    got, right = (torch.cat([t.flatten() for t in f.gradients.values()]) for f in (found, wanted))
    assert got.shape == right.shape
    assert (got - right).norm() <= tolerance * right.norm()


def assert_live(found: Found, tolerance: float = 1e-12) -> None:
    """Compare the look-ahead with real steps, from where the optimizer stood."""
    assert found.verdict == "right"
    assert_close(found.ahead, found.trained, tolerance)
