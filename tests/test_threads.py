"""One look-ahead at a time on one D."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import torch
from torch import nn

from tests.players import fakes, tanh_net
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


def test_look_aheads_in_several_threads() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            d = tanh_net()
            loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=3)
            for _ in range(10):
                loss(fakes(), randn(5, 3)).backward()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
