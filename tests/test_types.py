"""What a type checker knows: mypy fails this file where it knows something else."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import unroll


class Typed:
    """An objective with the types that it needs."""

    def discriminator_loss(self, d: unroll.Discriminator, fake: Tensor, real: Tensor) -> Tensor:
        return d(fake).mean() - d(real).mean()  # type: ignore[no-any-return]

    def generator_loss(self, d: unroll.Discriminator, fake: unroll.Batch, real: object) -> Tensor:
        return -d(fake).mean()  # type: ignore[no-any-return]


def test_results_have_types() -> None:
    d = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    loss = unroll.UnrolledGeneratorLoss(d, optimizer, Typed(), unroll_steps=1)
    fake, real = torch.ones(4, 2, requires_grad=True), torch.zeros(4, 2)
    assert_type(loss(fake, real), Tensor).backward()
    ahead = assert_type(loss.unroll(fake, real), unroll.UnrolledDiscriminator)
    assert_type(ahead.parameters, Mapping[str, Tensor])
    first, _ = unroll.gradient_terms(loss, fake, real, [fake])
    assert_type(first, tuple[Tensor, ...])
    assert_type(unroll.check_gradients(loss, fake, real).ok, bool)
