"""The gradient on real digits: the convolutional BatchNorm discriminator of Appendix C."""

import os

import pytest
import torch
from torch import nn

import unroll
from tests.settings import DEVICE


@pytest.mark.data
def test_the_gradient_is_right_on_mnist() -> None:
    from torchvision.datasets import MNIST

    digits = MNIST(os.environ["UNROLL_DATA"]).data[:16].to(DEVICE)
    real = digits.float().unsqueeze(1) / 127.5 - 1
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.3),
        ]
    d = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 1)).to(DEVICE)
    game = unroll.NonSaturating()
    optimizer = torch.optim.Adam(d.parameters(), lr=2e-4, betas=(0.5, 0.999))
    fake = torch.rand_like(real) * 2 - 1
    for _ in range(3):
        optimizer.zero_grad()
        game.discriminator_loss(d, fake, real).backward()
        optimizer.step()
    loss = unroll.UnrolledGeneratorLoss(d, optimizer, game, unroll_steps=3)
    report = unroll.check_gradients(loss, fake, real)
    assert report.ok, report
