"""Accelerate: what ``prepare`` returns, the page's loop, and two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.frameworks.loop import Found, Parts, assert_live, assert_same, plain, train
from tests.test_migrating import ACCELERATE, DIFFS, PLAIN, difference, run

accelerate: Any = pytest.importorskip("accelerate", reason="needs the extra `frameworks`")
pytestmark = pytest.mark.filterwarnings("default")  # the framework's own are not ours to mend


def found_by(**options: Any) -> Found:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    rank, world = accelerator.process_index, accelerator.num_processes
    parts = Parts.of_rank(rank, world, torch.float32 if options else torch.float64)
    g, d, g_optimizer, d_optimizer = accelerator.prepare(
        parts.generator, parts.discriminator, parts.g_optimizer, parts.d_optimizer
    )
    assert type(d_optimizer).__name__ == "AcceleratedOptimizer"
    prepared = Parts(g, d, g_optimizer, d_optimizer, parts.noise, parts.real)
    return train(prepared, accelerator.backward)


def save(folder: str) -> None:
    torch.set_num_threads(1)
    found = found_by()
    torch.save(vars(found), f"{folder}/{accelerate.PartialState().process_index}.pt")


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("side", [0, 1])
def test_the_page(side: int) -> None:
    assert difference(run(DIFFS[ACCELERATE][side]), run(DIFFS[PLAIN][side])) == 0.0


def test_one_process() -> None:
    found = found_by()
    assert_same(found, plain(), 0.0)
    assert_live(found)


def test_mixed_precision() -> None:
    found = found_by(mixed_precision="bf16")
    assert_same(found, plain(torch.float32, mixed=True), 0.0)
    assert_live(found, 1e-6)


def test_two_processes(tmp_path: Path) -> None:
    accelerate.debug_launcher(save, (str(tmp_path),), num_processes=2)
    for rank in range(2):
        found = Found(**torch.load(tmp_path / f"{rank}.pt"))
        assert found.sync
        assert_same(found, plain(), 1e-12)
        assert_live(found)
