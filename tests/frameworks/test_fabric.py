"""Fabric: what ``setup`` returns, the page's loop, and two processes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.frameworks.loop import Found, Parts, assert_live, assert_same, plain, train
from tests.test_migrating import DIFFS, DOCS, PLAIN, difference, run

lightning: Any = pytest.importorskip("lightning", reason="needs the extra `frameworks`")
pytestmark = pytest.mark.filterwarnings("default")  # the framework's own are not ours to mend


def found_by(fabric: Any, dtype: torch.dtype = torch.float64) -> Found:
    parts = Parts.of_rank(fabric.global_rank, fabric.world_size, dtype)
    g, g_optimizer = fabric.setup(parts.generator, parts.g_optimizer)
    d, d_optimizer = fabric.setup(parts.discriminator, parts.d_optimizer)
    assert type(d_optimizer).__name__ == "FabricAdam"
    set_up = Parts(g, d, g_optimizer, d_optimizer, parts.noise, parts.real)
    return train(set_up, fabric.backward, autocast=fabric.autocast)


def save(fabric: Any, folder: str) -> None:
    torch.set_num_threads(1)
    torch.save(vars(found_by(fabric)), f"{folder}/{fabric.global_rank}.pt")


def fabric_of(devices: int = 1, **options: Any) -> Any:
    return lightning.Fabric(accelerator="cpu", devices=devices, **options)


def test_the_page() -> None:
    (fit,) = re.findall(r"```python\n(def fit.*?)```", (DOCS / "frameworks.md").read_text(), re.S)
    call = "fit(fabric, generator, discriminator, g_optimizer, d_optimizer, data)"
    names = run(fit + call, fabric=fabric_of())
    assert difference(names, run(DIFFS[PLAIN][1])) == 0.0


def test_one_process() -> None:
    found = found_by(fabric_of())
    assert_same(found, plain(), 0.0)
    assert_live(found)


def test_mixed_precision() -> None:
    found = found_by(fabric_of(precision="bf16-mixed"), torch.float32)
    assert_same(found, plain(torch.float32, mixed=True), 0.0)
    assert_live(found, 1e-6)


def test_two_processes(tmp_path: Path) -> None:
    fabric_of(2, strategy="ddp_spawn").launch(save, str(tmp_path))
    for rank in range(2):
        found = Found(**torch.load(tmp_path / f"{rank}.pt"))
        assert found.sync
        assert_same(found, plain(), 1e-12)
        assert_live(found)
