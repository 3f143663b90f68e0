"""Several ranks play the game that one process plays with the global batch."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import OPTIMIZERS, Play, Routed, gradients, normalised, plain, played, synchronised
from unroll import R1, Minimax, RelativisticAverage, UnrolledGeneratorLoss


class Parted(nn.Module):
    """A D that wraps its network itself, where there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain().double()
        if dist.is_initialized():  # it would wait for gradients of real parameters
            self.body = DistributedDataParallel(self.body, find_unused_parameters=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(x)
        return output


def partly_averaged(of: str, rank: int, _world: int) -> list[list[Tensor]]:
    """Return D's parameters after real steps and after a look-ahead, one part not averaged."""
    torch.manual_seed(0)
    d: Any = plain().double()
    if of == "a parameter to be ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(d, ["2.weight"])
        wrapped: nn.Module = DistributedDataParallel(d)
    else:
        d[0] = DistributedDataParallel(d[0])
        wrapped = d
    optimizer = torch.optim.SGD(d.parameters(), lr=0.2, momentum=0.5)
    torch.manual_seed(rank)
    fake, real = torch.randn(2, 4, 3, dtype=torch.float64)
    loss = UnrolledGeneratorLoss(wrapped, optimizer, Minimax(), unroll_steps=3)
    ahead = loss.unroll(fake, real).parameters
    for _ in range(3):
        optimizer.zero_grad()
        Minimax().discriminator_loss(wrapped, fake, real).backward()
        optimizer.step()
    return [[p.detach() for p in d.parameters()], [p.detach() for p in ahead.values()]]


@pytest.mark.parametrize("of", ["a parameter to be ignored", "a part outside of the wrapper"])
def test_what_is_not_averaged_in_training_is_not_in_the_look_ahead(of: str, tmp_path: Path) -> None:
    results = [found for (found,) in played([of], 2, tmp_path, partly_averaged)]
    for trained, ahead in results:
        torch.testing.assert_close(ahead, trained, rtol=1e-12, atol=1e-14)
    assert not torch.equal(results[0][0][2], results[1][0][2])
    assert torch.equal(results[0][0][0], results[1][0][0])


GLOBAL = [
    Play(steps, optimizer, resampled, options={"checkpoint": True} if checkpoint else {})
    for steps, optimizer, resampled, checkpoint in product(
        (1, 3), OPTIMIZERS, (False, True), (False, True)
    )
] + [
    Play(3, objective=Minimax() + R1(1.0)),
    Play(3, options={"average": True}),
    Play(3, options={"stop_gradient": True}),
    Play(3, options={"sync": True}, wrap=False),
    Play(3, discriminator=Parted, wrap=False),
    Play(0),
]  # fmt: skip
LOCAL = [Play(3, options={"sync": False}), Play(3, wrap=False)]
PER_RANK = [
    Play(3, discriminator=Routed),
    Play(3, discriminator=Routed, options={"checkpoint": True}),
    Play(3, "SGD", discriminator=normalised),
    Play(3, objective=RelativisticAverage()),
]
DISAGREEING: dict[str, Play] = {
    r"unroll_steps: \[3, 2": Play(3, of_rank_1={"options": {"unroll_steps": 2}}),
    r"unroll_steps: \[3, 0.*failed: \[0, 1": Play(3, resampled=True, of_rank_1={"minibatches": 2}),
    r"failed: \[0, 1": Play(3, of_rank_1={"detached": True}),
    r"a graph is needed: \[1, 0": Play(3, of_rank_1={"options": {"stop_gradient": True}}),
    r"checkpoint: \[0, 1": Play(3, of_rank_1={"options": {"checkpoint": True}}),
}
REFUSED = Play(3, options={"sync": True}, discriminator=synchronised, wrap=False)
PLAYS = [*GLOBAL, *LOCAL, *PER_RANK, *DISAGREEING.values(), REFUSED]


class Shared:
    """The mean of a game over equal shares of the batch."""

    def __init__(self, game: Any, shares: int) -> None:
        self.game, self.shares = game, shares

    def _mean(self, name: str, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        pairs = zip(fake.chunk(self.shares), real.chunk(self.shares), strict=True)
        method = getattr(self.game, name)
        return torch.stack([method(discriminator, f, r) for f, r in pairs]).mean()

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        return self._mean("discriminator_loss", discriminator, fake, real)

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        return self._mean("generator_loss", discriminator, fake, real)


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the number of ranks and what they got, for every play."""
    world: int = request.param
    results = played(PLAYS, world, Path(tmp_path_factory.mktemp("ranks")))
    by_play = zip(*results, strict=True)
    return world, {id(play): found for play, found in zip(PLAYS, by_play, strict=True)}


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    a, b = (torch.cat([t.flatten() for t in found]) for found in (got, wanted))
    assert a.numel() == 9
    assert (a - b).norm() <= 1e-10 * b.norm()


def alone(play: Play, **changed: Any) -> list[Tensor]:
    """Return the gradients of one process with all samples."""
    options = {k: v for k, v in play.options.items() if k != "sync"}
    settings = {**vars(play), "options": options, **changed}
    return gradients(Play(**settings), 0, 1)


@pytest.mark.parametrize("play", GLOBAL, ids=str)
def test_equals_one_process_with_the_global_batch(ranks: Any, play: Play) -> None:
    _, results = ranks
    for found in results[id(play)]:
        assert_close(found, alone(play))


@pytest.mark.parametrize("play", PER_RANK, ids=["routed", "checkpointed", "BatchNorm", "average"])
def test_equals_the_mean_of_the_ranks_games(ranks: Any, play: Play) -> None:
    """Where samples depend on each other, or a rank has no gradient for a parameter."""
    world, results = ranks
    wanted = alone(play, objective=Shared(play.objective, world))
    for found in results[id(play)]:
        assert_close(found, wanted)


@pytest.mark.parametrize("play", LOCAL, ids=["sync=False", "D not wrapped"])
def test_without_sync_every_rank_plays_its_own_game(ranks: Any, play: Play) -> None:
    world, results = ranks
    own = [gradients(Play(3), rank, world) for rank in range(world)]
    wanted = [torch.stack(parts).mean(0) for parts in zip(*own, strict=True)]
    for found in results[id(play)]:
        assert_close(found, wanted)
    (together,) = {id(p): results[id(p)][0] for p in GLOBAL if p == Play(3)}.values()
    assert (together[0] - wanted[0]).norm() > 1e-3 * wanted[0].norm()


@pytest.mark.parametrize("message", DISAGREEING)
def test_ranks_that_disagree_are_told(ranks: Any, message: str) -> None:
    _, results = ranks
    first, second, *_ = results[id(DISAGREEING[message])]
    pattern = rf"^RuntimeError: sync: all ranks must take the same.*{message}.*sync=False"
    assert re.search(pattern, first)
    own = {"minibatches": "^ValueError: minibatches", "detached": "^ValueError: fake: must carry"}
    (changed,) = DISAGREEING[message].of_rank_1
    assert re.search(own.get(changed, pattern), second)


def test_synchronised_batch_norm_is_refused(ranks: Any) -> None:
    _, results = ranks
    for said in results[id(REFUSED)]:
        assert re.search(r"^RuntimeError: discriminator: 1 \(SyncBatchNorm\).*Use BatchNorm", said)


def test_sync_needs_a_process_group() -> None:
    d = plain()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^sync: .* not initialised\. Call .*init_process_group"):
        UnrolledGeneratorLoss(d, optimizer, unroll_steps=1, sync=True)
    with pytest.raises(TypeError, match=r"^sync: must be True, False or None; got 'yes'"):
        UnrolledGeneratorLoss(d, optimizer, unroll_steps=1, sync="yes")  # type: ignore[arg-type]
    assert UnrolledGeneratorLoss(d, optimizer, unroll_steps=1).sync is False


class _FabricModule(nn.Module):
    """A wrapper as Fabric's ``setup`` returns it; tests/frameworks has the real one."""

    def __init__(self, forward_module: nn.Module) -> None:
        super().__init__()
        self._forward_module = forward_module


def test_a_discriminator_set_up_by_fabric_is_looked_through(tmp_path: Path) -> None:
    d = plain()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        loss = UnrolledGeneratorLoss(
            _FabricModule(DistributedDataParallel(d)), optimizer, unroll_steps=1
        )
        assert loss.sync
        assert loss.discriminator is d
    finally:
        dist.destroy_process_group()


def test_a_sharded_discriminator_is_refused(tmp_path: Path) -> None:
    d = plain()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(d, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
        with pytest.raises(TypeError, match=r"sharded by FSDP.*Wrap D in DistributedDataParallel"):
            UnrolledGeneratorLoss(d, optimizer, unroll_steps=1)
    finally:
        dist.destroy_process_group()
