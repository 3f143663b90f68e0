"""The steps of the look-ahead: what repeats itself, what is given back, what all ranks do alike."""

import copy
import random
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchopt.base import GradientTransformation

import unroll
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot

Loss = unroll.UnrolledGeneratorLoss


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).to(DEVICE).double()


def sgd(d: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(d.parameters(), lr=0.5)


def gradient(loss: Loss, fake: Tensor, real: Any, feed: Callable[[Tensor], Any]) -> Tensor:
    random.seed(1)
    torch.manual_seed(1)
    x = fake.clone().requires_grad_()
    return torch.autograd.grad(loss(feed(x), real), x)[0]


def plain_and_recomputed(
    make: Callable[[], nn.Module],
    objective: Callable[[], Any] = unroll.NonSaturating,
    optimizer: Callable[[nn.Module], Any] = sgd,
    feed: Callable[[Tensor], Any] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """Return the gradients without and with checkpoint=, on equal copies."""
    d, fake, real = make().to(DEVICE).double(), randn(5, 3), randn(5, 3)
    found = []
    for checkpoint in (False, True):
        mine = copy.deepcopy(d)
        loss = Loss(mine, optimizer(mine), objective(), unroll_steps=4, checkpoint=checkpoint)
        found.append(gradient(loss, fake, feed(real), feed))
    assert found[0].norm() > 0
    return found[0], found[1]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()


class Counting(Wrapped):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        output: Tensor = self.net(x) * (1 + 0.3 * self.calls)
        return output


class Centring(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(3, device=DEVICE, dtype=torch.float64)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        output: Tensor = self.net(x - self.mean)
        return output


class Skipping(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x) * (2.0 if random.random() < 0.5 else 1.0)
        return output


class Lazy(unroll.NonSaturating):
    """A penalty at every other step, by a counter of the objective's own."""

    calls = 0

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        type(self).calls += 1
        loss = super().discriminator_loss(discriminator, fake, real)
        if self.calls % 2:
            loss = loss + unroll.R1(1.0).discriminator_loss(discriminator, fake, real)
        return loss


def lazy() -> Lazy:
    Lazy.calls = 0
    return Lazy()


@pytest.mark.parametrize(
    ("make", "objective"),
    [
        (Counting, unroll.NonSaturating),
        (Centring, unroll.NonSaturating),
        (Skipping, unroll.NonSaturating),
        (net, lazy),
    ],
    ids=["counter", "plain attribute", "Python's random numbers", "objective's counter"],
)
def test_a_step_that_does_not_repeat_itself_is_right_or_refused(
    make: Callable[[], nn.Module], objective: Callable[[], Any]
) -> None:
    try:
        plain, recomputed = plain_and_recomputed(make, objective)
    except RuntimeError as error:
        assert str(error).startswith("checkpoint: ")
    else:
        torch.testing.assert_close(recomputed, plain)


class Deviations(nn.Module):
    """It tracks a deviation that is zero, where the root has no slope, and does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 1)
        self.register_buffer("deviation", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh() * torch.tensor([1.0, 1, 1, 1, 1, 0], device=x.device)
        self.deviation = h.var(0).sqrt()
        output: Tensor = self.last(h)
        return output


def test_what_f_does_not_depend_on_makes_no_nan() -> None:
    plain, recomputed = plain_and_recomputed(Deviations)
    torch.testing.assert_close(recomputed, plain)


class OfTwo(Wrapped):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        output: Tensor = self.net(x) + (self.net(y) * x.sum(1, keepdim=True)).tanh()
        return output


def test_a_penalty_on_a_tensor_that_stands_twice_in_the_batch() -> None:
    def game() -> Any:
        return unroll.NonSaturating() + unroll.R1(1.0)

    plain, recomputed = plain_and_recomputed(OfTwo, game, feed=lambda x: (x, x))
    torch.testing.assert_close(recomputed, plain)


def remembering(_: nn.Module) -> GradientTransformation:
    """Return gradient descent along the last three gradients, kept in a deque."""

    def init(params: Any) -> Any:
        return deque([tuple(map(torch.zeros_like, params))] * 2, maxlen=2)

    def update(updates: Any, state: Any, **_: Any) -> Any:
        columns = zip(updates, state[1], state[0], strict=True)
        moves = tuple(-0.3 * (g + 0.5 * a + 0.25 * b) for g, a, b in columns)
        return moves, deque([state[1], tuple(updates)], maxlen=2)

    return GradientTransformation(init, update)


def test_every_container_that_a_transformation_may_keep_its_state_in() -> None:
    plain, recomputed = plain_and_recomputed(net, optimizer=remembering)
    torch.testing.assert_close(recomputed, plain)


def test_a_learning_rate_in_a_tensor_takes_no_gradient() -> None:
    def asgd(d: nn.Module) -> torch.optim.ASGD:
        return torch.optim.ASGD(d.parameters(), lr=torch.tensor(0.1))

    plain, recomputed = plain_and_recomputed(net, optimizer=asgd)  # a warning is an error
    torch.testing.assert_close(recomputed, plain)


class Encoding(UserDict[str, Any]):
    """A mapping with attributes, as tokenizers return it."""

    @property
    def image(self) -> Any:
        return self.data["x"]


class ByAttribute(unroll.NonSaturating):
    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        loss: Tensor = (discriminator(fake) - fake.image.square().sum(1, keepdim=True)).mean()
        return loss


def test_an_objective_gets_a_mapping_of_the_users_class() -> None:
    d, x = net(), randn(5, 3).requires_grad_()
    keyed = nn.Module()
    keyed.net = d
    keyed.forward = lambda x: d(x)
    batch = (Encoding(x=x), Encoding(x=randn(5, 3)))
    value = Loss(keyed, sgd(keyed), ByAttribute(), unroll_steps=0)(*batch)
    torch.testing.assert_close(value, (d(x) - x.square().sum(1, keepdim=True)).mean())


class OwnR1(unroll.NonSaturating):
    """The penalty as most loops spell it."""

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        real.requires_grad_()
        (slope,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
        penalty: Tensor = slope.square().sum()
        return super().discriminator_loss(discriminator, fake, real) + penalty


def test_an_objective_that_switches_gradients_on_leaves_the_batch_alone() -> None:
    d, fake, real = net(), randn(5, 3), randn(5, 3)
    loss = Loss(d, sgd(d), OwnR1(), unroll_steps=2)
    ahead = loss.unroll(fake, real)
    assert not any(p.requires_grad for p in ahead.parameters.values())
    loss(fake.clone().requires_grad_(), real).backward()
    assert not real.requires_grad
    assert real.grad is None


class Tracking(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.tracked = {"mean": torch.zeros(3, device=DEVICE, dtype=torch.float64)}

    def forward(self, x: Tensor) -> Tensor:
        self.tracked["mean"].mul_(0.5).add_(x.detach().mean(0))
        output: Tensor = self.net(x - self.tracked["mean"].clone())
        return output


@pytest.mark.plain
def test_a_tensor_in_a_container_of_d_stays() -> None:
    d = Tracking()
    optimizer = sgd(d)
    before = snapshot(d, optimizer)
    Loss(d, optimizer, unroll_steps=2)(randn(5, 3).requires_grad_(), randn(5, 3)).backward()
    assert not changes(before, d, optimizer)


def clipped(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-0.01, 0.01)


def test_hooks_after_accumulation_are_not_passed_over_in_silence() -> None:
    d = net()
    for parameter in d.parameters():
        parameter.register_post_accumulate_grad_hook(clipped)
    with pytest.warns(UserWarning, match="hooks"):
        Loss(d, sgd(d), unroll_steps=1)


def test_a_layer_is_refused_once_it_is_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    d = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4), nn.Linear(4, 1)).to(DEVICE).double()
    loss = Loss(d, sgd(d), unroll_steps=1)
    d.eval()
    loss(randn(5, 3).requires_grad_(), randn(5, 3))
    d.train()
    with pytest.raises(RuntimeError, match="SyncBatchNorm"):
        loss(randn(5, 3).requires_grad_(), randn(5, 3))


@pytest.fixture
def collectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Be the only rank, and list the collectives, of which all ranks must make the same."""
    made: list[str] = []
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    for name in ("all_reduce", "all_gather"):

        def counted(*args: Any, name: str = name, do: Any = getattr(dist, name), **kw: Any) -> Any:
            made.append(name)
            return do(*args, **kw)

        monkeypatch.setattr(dist, name, counted)
    yield made
    dist.destroy_process_group()


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(3))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x @ self.weight
        return output


class RealOnly(unroll.Wasserstein):
    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        loss: Tensor = -discriminator(real).mean()
        return loss


@pytest.mark.filterwarnings("ignore:objective. discriminator_loss does not depend")
def test_a_rank_whose_gradients_are_constant_makes_the_same_collectives(
    collectives: list[str],
) -> None:
    counts = []
    for objective in (unroll.Wasserstein(), RealOnly()):
        collectives.clear()
        d, x = Critic(), randn(5, 3).requires_grad_()
        loss = Loss(d, sgd(d), objective, unroll_steps=3, sync=True)
        torch.autograd.grad(loss(x, randn(5, 3)), x)
        counts.append(list(collectives))
    assert counts[0] == counts[1]


def test_a_rank_that_logs_with_a_graph_makes_the_same_collectives(collectives: list[str]) -> None:
    counts = []
    for fake in (randn(5, 3), randn(5, 3).requires_grad_()):
        collectives.clear()
        d = net()
        Loss(d, sgd(d), unroll_steps=2, sync=True).unroll(fake, randn(5, 3))
        counts.append(list(collectives))
    assert counts[0] == counts[1]


@pytest.mark.plain
@pytest.mark.parametrize(("checkpoint", "wanted"), [(False, 6), (True, 9)])
def test_the_search_of_the_first_call_takes_no_collective(
    checkpoint: bool, wanted: int, collectives: list[str]
) -> None:
    """A mean a step and its adjoint; checkpointed, that of the step that runs again."""
    d = net()
    loss = Loss(d, sgd(d), unroll_steps=3, sync=True, checkpoint=checkpoint)
    for _ in range(2):
        collectives.clear()
        loss(randn(5, 3).requires_grad_(), randn(5, 3)).backward()
        assert collectives.count("all_reduce") == wanted


def test_one_rank_alone_can_check_gradients(collectives: list[str]) -> None:
    d = net()
    loss = Loss(d, sgd(d), unroll_steps=2, sync=True)
    pairs = [(randn(5, 3), randn(5, 3)) for _ in range(3)]
    assert unroll.check_gradients(loss, *pairs[0], minibatches=pairs[1:]).ok
    assert not collectives
