"""Lightning: manual optimisation, the page's module, and two processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.frameworks.loop import Found, Parts, assert_live, assert_same, plain, train
from tests.test_migrating import DIFFS, LIGHTNING, PLAIN, difference, run

lightning: Any = pytest.importorskip("lightning", reason="needs the extra `frameworks`")
pytestmark = pytest.mark.filterwarnings("default")  # the framework's own are not ours to mend


class GAN(lightning.LightningModule):  # type: ignore[misc]
    """The whole loop in one training step, saved by each rank."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.folder, self.options = folder, options
        parts = Parts.of_rank(0, 1)
        self.generator, self.discriminator = parts.generator, parts.discriminator
        self.configured = parts.g_optimizer, parts.d_optimizer

    def configure_optimizers(self) -> Any:
        return self.configured

    @contextmanager
    def turn(self, optimizer: Any) -> Iterator[None]:
        self.toggle_optimizer(optimizer)
        yield
        self.untoggle_optimizer(optimizer)

    def training_step(self, _: Tensor) -> None:
        share = Parts.of_rank(self.global_rank, self.trainer.world_size)
        g_optimizer, d_optimizer = self.optimizers()
        assert type(d_optimizer).__name__ == "LightningAdam"
        players = self.generator, self.discriminator
        parts = Parts(*players, g_optimizer, d_optimizer, share.noise, share.real)
        found = train(parts, self.manual_backward, self.turn, **self.options)
        torch.save(vars(found), self.folder / f"{self.global_rank}.pt")


class Loader:
    """Batches as they are; a DataLoader would draw from the generator of random numbers."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def fit(module: Any, batches: Sequence[Tensor] = (torch.zeros(1),), **options: Any) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, **options},
    )
    trainer.fit(module, Loader(batches))


def found_in(folder: Path, rank: int = 0) -> Found:
    return Found(**torch.load(folder / f"{rank}.pt"))


@pytest.mark.parametrize("side", [0, 1])
def test_the_page(side: int) -> None:
    names = run(DIFFS[LIGHTNING][side] + "\nmodule = GAN()\nfit(module, data)", fit=fit)
    assert difference(names, run(DIFFS[PLAIN][side])) == 0.0
    keys = {key.split(".")[0] for key in names["module"].state_dict()}
    assert keys == {"generator", "discriminator"}


def test_one_process(tmp_path: Path) -> None:
    fit(GAN(tmp_path))
    assert_same(found_in(tmp_path), plain(), 0.0)
    assert_live(found_in(tmp_path))


def test_mixed_precision() -> None:
    program = DIFFS[LIGHTNING][1] + "\nfit(GAN(), data, precision='bf16-mixed')"
    found = run(program, dtype=torch.float32, fit=fit)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # as in Lightning
        wanted = run(DIFFS[PLAIN][1], dtype=torch.float32)
    assert difference(found, wanted) == 0.0


def test_two_processes(tmp_path: Path) -> None:
    """Lightning wraps the module, not D in it, so that ``sync=True`` has to be said."""
    strategy = "ddp_spawn_find_unused_parameters_true"
    fit(GAN(tmp_path, sync=True), devices=2, strategy=strategy)
    for rank in range(2):
        assert_same(found_in(tmp_path, rank), plain(), 1e-12)
        assert_live(found_in(tmp_path, rank))
