"""Discriminators from the papers: one step of the generator each, and its gradient checked."""

import re

import pytest
import torch
from torch import nn

import unroll
from tests.architectures import ARCHITECTURES, Architecture, pictures
from tests.players import train
from tests.settings import DEVICE
from tests.snapshot import changes, snapshot
from unroll import UnrolledGeneratorLoss

FIXUP = re.compile(r"conv[12]\.weight|bias[12]")


def play(
    architecture: Architecture, width: int, samples: int, d_steps: int
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, tuple[torch.Tensor, ...]]:
    """Return G, D after real steps of it, D's optimizer and what G takes next."""
    generator = architecture.generator(width).to(DEVICE)
    discriminator = architecture.discriminator(width).to(DEVICE)
    optimizer = architecture.adam(discriminator)
    for _ in range(d_steps):
        inputs = architecture.draw(samples)
        fake = architecture.feed(generator(*inputs).detach(), *inputs)
        real = architecture.feed(*pictures(samples), *inputs)
        train(discriminator, optimizer, [(fake, real)], architecture.objective)
    return generator, discriminator, optimizer, architecture.draw(samples)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_step_of_the_generator(name: str) -> None:
    """At four times the width of the gradient check, in float32, after two real steps of D."""
    architecture = ARCHITECTURES[name]
    generator, d, optimizer, inputs = play(architecture, 4 * architecture.width, 4, 2)
    loss = UnrolledGeneratorLoss(d, optimizer, architecture.objective, unroll_steps=3)
    g_optimizer = architecture.adam(generator)
    start = [p.detach().clone() for p in generator.parameters()]
    before = snapshot(d, optimizer)
    fake = architecture.feed(generator(*inputs), *inputs)
    value = loss(fake, architecture.feed(*pictures(4), *inputs))
    value.backward()
    assert not changes(before, d, optimizer)
    assert value.isfinite()
    for p in generator.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
    g_optimizer.step()
    pairs = zip(generator.named_parameters(), start, strict=True)
    still = {n for (n, p), s in pairs if torch.equal(p, s)}
    # Fix-up starts every residual block of R3GAN with a convolution of zeros.
    assert all(name == "R3GAN" and FIXUP.search(n) for n in still), still


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_is_checked(name: str) -> None:
    """In float64, at the width of the table, with two samples.

    Every ReLU that flips makes D's gradient, and so f_K, jump: central differences need few units.
    """
    architecture = ARCHITECTURES[name]
    generator, d, optimizer, inputs = play(architecture, architecture.width, 2, 4)
    loss = UnrolledGeneratorLoss(d, optimizer, architecture.objective, unroll_steps=3)
    fake = architecture.feed(generator(*inputs), *inputs)
    before = snapshot(d, optimizer)
    real = architecture.feed(*pictures(2), *inputs)
    report = unroll.check_gradients(loss, fake, real)
    assert report.ok, report
    assert report.relative_error < 1e-6, report
    terms = unroll.gradient_terms(loss, fake, real, generator.parameters())
    first, second = (torch.cat([t.flatten() for t in term]).norm() for term in terms)
    assert second > 0.01 * first  # or the check would say little of the second term
    assert not changes(before, d, optimizer)
