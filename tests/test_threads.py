"""One look-ahead at a time on one D."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from tests.settings import DEVICE, randn
from unroll import UnrolledGeneratorLoss


def test_threads_that_share_d_get_the_value_of_one() -> None:
    """Two losses on one D, four threads; backward passes, which hold no lock, overlap."""
    d = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).to(DEVICE, torch.float64)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.1)
    losses = [
        UnrolledGeneratorLoss(d, optimizer, unroll_steps=5, checkpoint=checkpoint)
        for checkpoint in (False, True)
    ]
    fake, real = randn(20, 3), randn(20, 3)

    def played(number: int) -> tuple[float, float]:
        x = fake.clone().requires_grad_()
        value = losses[number % 2](x, real)
        (gradient,) = torch.autograd.grad(value, x)
        return value.item(), gradient.norm().item()

    wanted = [played(number) for number in range(2)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(played, range(80)))
    for number, values in enumerate(found):
        assert values == wanted[number % 2]


def test_the_lock_is_no_part_of_the_loss() -> None:
    d = nn.Linear(3, 1)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)
    x = torch.randn(4, 3)
    wanted = loss(x.requires_grad_(), x)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(x, x), wanted)
