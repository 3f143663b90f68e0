"""``loss.discriminator_loss``: D's own loss in the loop, of the same game as the look-ahead's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unroll
from tests.games import OBJECTIVES
from tests.settings import DEVICE
from tests.test_check_step import Conditional, OwnGame, batch, net, plain
from unroll import UnrolledGeneratorLoss as Loss


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loop_takes_the_look_aheads_first_step_bit_for_bit(objective: str) -> None:
    """By a rate of 1/2, with which the product is exact: some kernels round it, others do not."""
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.5), OBJECTIVES[objective], unroll_steps=1)
    fake, real = batch(), batch() + 1
    torch.manual_seed(0)
    ahead = loss.unroll(fake, real)
    torch.manual_seed(0)
    loss.optimizer.zero_grad()
    value = loss.discriminator_loss(fake, real)
    value.backward()
    assert torch.equal(value.detach(), ahead.losses[0])
    loss.optimizer.step()
    for name, p in d.named_parameters():
        assert torch.equal(p, ahead.parameters[name]), name


def test_fakes_are_detached_and_real_samples_are_not() -> None:
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)
    fake, real = batch().requires_grad_(), batch().requires_grad_()
    loss.discriminator_loss(fake, real).backward()
    assert fake.grad is None
    assert real.grad is not None
    with torch.no_grad():
        assert not loss.discriminator_loss(fake, real).requires_grad


class Wrapper(nn.DataParallel[Any]):
    """Counts its calls, as DistributedDataParallel acts on them."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


def test_d_is_called_in_its_wrapper_in_a_training_forward() -> None:
    """Buffers and random numbers move as in any loop."""
    d = net(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.LeakyReLU(0.2)).to(DEVICE)
    wrapped = Wrapper(d)
    loss = Loss(wrapped, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)
    twin: Any = copy.deepcopy(d)
    fake, real = batch(), batch()
    torch.manual_seed(0)
    value = loss.discriminator_loss(fake, real)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    expected = unroll.Minimax().discriminator_loss(twin, fake, real)
    assert torch.equal(value, expected)
    assert torch.equal(after, torch.get_rng_state())
    assert wrapped.calls == 2
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, d.get_buffer(name))
    assert d.get_buffer("1.num_batches_tracked").item() == 2


@pytest.mark.parametrize("mapping", [False, True])
def test_batches_unpack(mapping: bool) -> None:
    """Also where a shipped objective or a penalty gets the module itself."""
    d: Any = Conditional().to(DEVICE)
    label = torch.randint(10, (12,), device=DEVICE)
    x, y = batch(), batch()
    fake, real = ({"x": t, "label": label} if mapping else (t, label) for t in (x, y))
    for game in (unroll.Hinge() + unroll.R1(1.0) + unroll.GradientPenalty(1.0), OwnGame()):
        loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), game, unroll_steps=1)
        torch.manual_seed(0)
        value = loss.discriminator_loss(fake, real)
        torch.manual_seed(0)
        assert torch.equal(value.detach(), loss.unroll(fake, real).losses[0])
        if not isinstance(game, OwnGame):
            torch.manual_seed(0)
            assert torch.equal(value, game.discriminator_loss(d, fake, real))
    by_hand = torch.relu(1 - d(y, label)).mean() + torch.relu(1 + d(x, label)).mean()
    assert torch.equal(unroll.Hinge().discriminator_loss(d, fake, real), by_hand)
    assert torch.equal(unroll.Hinge().generator_loss(d, fake, real), -d(x, label).mean())


def test_a_list_is_one_argument() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 1)

        def forward(self, parts: list[Tensor]) -> Tensor:
            output: Tensor = self.head(sum(parts))
            return output

    d = Sums().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)
    fake, real = ([batch(), batch()],), ([batch(), batch()],)
    value = loss.discriminator_loss(fake, real)
    assert torch.equal(value.detach(), loss.unroll(fake, real).losses[0])


def test_the_loss_must_be_a_0_d_tensor() -> None:
    class Each(OwnGame):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Any:
            return discriminator(fake)

    class Number(OwnGame):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Any:
            return 1.0

    d = net().to(DEVICE)
    for game, error in ((Each(), ValueError), (Number(), TypeError)):
        loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), game, unroll_steps=1)
        with pytest.raises(error, match=r"^objective: discriminator_loss must return a 0-d tensor"):
            loss.discriminator_loss(batch(), batch())


def moved(loss: Loss) -> set[str]:
    ahead = loss.unroll(batch(), batch())
    own = dict(loss.discriminator.named_parameters())
    return {n for n, p in ahead.parameters.items() if not torch.equal(p, own[n])}


def test_it_is_a_time_when_parameters_required_gradients() -> None:
    """A loop that freezes all of D for G's step, and some of it in D's."""
    d = net().to(DEVICE).requires_grad_(False)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)
    assert len(moved(loss)) == 6  # where nothing ever required one
    d[4].requires_grad_(True)
    plain(loss)(batch(), batch())
    d.requires_grad_(False)
    assert moved(loss) == {"4.weight", "4.bias"}
    d.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"were frozen or unfrozen since the last"):
        loss.discriminator_loss(batch(), batch())
    d.requires_grad_(False)
    assert len(moved(loss)) == 6


def test_a_look_ahead_is_not_disturbed() -> None:
    """D's own step between two look-aheads leaves nothing in the loss but who moves."""
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)
    fake, real = batch().requires_grad_(), batch()
    before = loss(fake, real)
    loss.discriminator_loss(fake, real).backward()
    assert torch.equal(loss(fake, real), before)
    before.backward()
    assert fake.grad is not None
