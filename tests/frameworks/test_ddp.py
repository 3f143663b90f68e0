"""Two real processes with DistributedDataParallel, which need nothing but torch."""

from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from tests.frameworks.loop import Found, Parts, assert_live, assert_same, plain, train
from tests.ranks import played


def found_by(_: object, rank: int, world: int) -> dict[str, Any]:
    parts = Parts.of_rank(rank, world)
    players = parts.generator, parts.discriminator
    parts.generator, parts.discriminator = map(DistributedDataParallel, players)
    return vars(train(parts))


def test_two_processes(tmp_path: Path) -> None:
    for (result,) in played([None], 2, tmp_path, found_by):
        found = Found(**result)
        assert found.sync
        assert_same(found, plain(), 1e-12)
        assert_live(found)
