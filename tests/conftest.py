"""Seeds, and the tests that need the real data sets."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import unroll

# Files, and single tests of others, that together see a value, a gradient, real steps and a refusal
# of every optimizer and objective, in every mode.
QUICK = {
    "test_by_hand",
    "test_checkpoint::test_every_kind_of_optimizer",
    "test_closed_forms",
    "test_errors",
    "test_fuzz::test_every_optimizer",
    "test_gradients::test_equals_the_naive_loop",
    "test_gradients::test_stop_gradient_is_a_loop_that_detaches",
    "test_gradients::test_the_two_terms_sum_to_the_whole",
    "test_import",
    "test_in_place",
    "test_inspection",
    "test_live::test_in_the_graph_too",
    "test_loss",
    "test_moving",
    "test_nan::test_slope_at_a_zero_moment",
    "test_objectives",
    "test_projections::test_real_steps",
    "test_site",
    "test_state::test_nothing_changes",
    "test_transformations::test_refusals",
    "test_transforms::test_equals_real_steps_that_clip",
    "test_types",
    "test_used_as_d",
}
LEFT_OUT = pytest.StashKey[int]()  # tests that no worker ran
collect_ignore = ["benchmarks/jax_worker.py"]  # runs in an environment of its own, with JAX


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype behind"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoint", action="store_true", help="every loss with checkpoint=True")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--checkpoint"):
        defaults = unroll.UnrolledGeneratorLoss.__init__.__kwdefaults__
        assert defaults is not None
        defaults["checkpoint"] = True
    torch.set_num_threads(1)  # the networks of the tests are too small to share
    config.addinivalue_line("markers", "data: reads the data sets in the folder named UNROLL_DATA")
    config.addinivalue_line("markers", "generated: has Inductor generate code, which takes a while")
    config.addinivalue_line("markers", "quick: the first to run")
    config.addinivalue_line(
        "markers", "plain: counts evaluations or keeps state, which --checkpoint changes or refuses"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        file, function = item.path.stem, getattr(item, "originalname", "")
        if QUICK & {file, f"{file}::{function}"}:
            item.add_marker("quick")
    unwanted = set[str]()
    if not os.environ.get("UNROLL_DATA"):
        unwanted.add("data")
    if config.getoption("--checkpoint"):
        unwanted.add("plain")
    left_out = [i for i in items if any(i.get_closest_marker(name) for name in unwanted)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    if hasattr(config, "workeroutput"):  # of pytest-xdist, which does not count them
        config.workeroutput["left_out"] = len(left_out)


def pytest_collection_finish() -> None:
    """Let the collector pass over modules and tests, and look less often at what tracing makes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{config.stash[LEFT_OUT]} deselected")
