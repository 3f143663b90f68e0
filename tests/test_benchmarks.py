"""The benchmark: all peers compute the same thing, and the record says how it was measured."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch.utils.benchmark import Timer

from tests.benchmarks import cell, peers, run
from tests.benchmarks.figures import above_no_steps, draw
from tests.benchmarks.networks import NETWORKS, game
from tests.benchmarks.record import COLUMNS, Cell, Record, table

PRESENT = [peer for peer in peers.TORCH_PEERS if peer not in peers.absent()]
TINY = Cell("tiny", 3, "default")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:higher", "ignore::FutureWarning:higher")
def test_the_peers_agree_on_the_gradient_and_leave_the_game_as_it_was() -> None:
    played = game(NETWORKS["tiny"])
    steps = {peer: peers.build(peer, played, 3) for peer in PRESENT}
    gradients = {peer: list(step()) for peer, step in steps.items()}
    errors = run.disagreements("tiny", gradients)
    assert set(errors) == {*PRESENT} - {peers.PLAIN}
    assert max(errors.values()) < 1e-6
    for peer, step in steps.items():  # a compiled one takes its first step by itself
        for once, again in zip(step(), step(), strict=True):
            assert torch.equal(once, again), peer


def test_without_steps_the_unit_is_the_ordinary_generator_step() -> None:
    played = game(NETWORKS["tiny"])
    gradients = {peer: list(peers.build(peer, played, 0)()) for peer in PRESENT}
    assert peers.PLAIN in run.disagreements("tiny", gradients)


def test_a_wrong_gradient_is_not_timed() -> None:
    played = game(NETWORKS["tiny"])
    right = list(peers.build(peers.UNROLL, played, 3)())
    first_term = list(peers.unrolled(played, 3, stop_gradient=True)())
    for wrong in (first_term, [t * float("nan") for t in right]):
        with pytest.raises(AssertionError, match="higher on tiny: its gradient is"):
            run.disagreements("tiny", {peers.UNROLL: right, "higher": wrong})


def test_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "betty" in peers.absent()
    assert "higher" not in peers.absent()
    monkeypatch.setattr(peers, "version", lambda _: missing())
    assert peers.absent()["higher"] == "pip install higher"
    assert peers.installed("higher") == "absent"


def missing() -> str:
    raise PackageNotFoundError


def test_times_of_peers_in_turns() -> None:
    order = []

    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()

    def step(peer: str, seconds: float) -> None:
        order.append(peer)
        clock.now += seconds

    seconds = {peers.PLAIN: 1.0, peers.UNROLL: 3.0, "higher": 4.0, peers.JAX: 2.0}
    timers = {
        peer: Timer("step(peer, s)", globals={"step": step, "peer": peer, "s": s}, timer=clock)
        for peer, s in seconds.items()
    }
    times = cell.in_turns(timers, seconds, budget=1.0)
    assert [*dict.fromkeys(order[: len(order) // 3])] == [*seconds]
    assert order[: len(order) // 3] * 3 == order  # round after round
    found = cell.summary(times)[peers.UNROLL]
    assert (found["rounds"], found["best_torch_peer"]) == (3, "higher")
    for column, expected in {
        "median_ms": 3e3,
        "vs_plain": 3.0,
        "vs_best_torch_peer": 0.75,
        "vs_jax": 1.5,
    }.items():
        assert found[column] == pytest.approx(expected)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    bench = run.Bench([peers.PLAIN, peers.UNROLL], threads=1, budget=0.1, limit=300.0, jax=None)
    return bench.measure(TINY)


def test_a_row_has_all_columns(rows: list[dict[str, str]], tmp_path: Path) -> None:
    assert [row["peer"] for row in rows] == [peers.PLAIN, peers.UNROLL]
    alone = {"best_torch_peer", "vs_best_torch_peer", "vs_jax", "jax", "optax", "jax_form"}
    for row in rows:
        assert tuple(row) == COLUMNS
        ours = alone if row["peer"] == peers.UNROLL else alone | {"gradient_error"}
        assert {column for column in COLUMNS if not row[column]} == ours
        assert (row["status"], row["threads"], row["torch"]) == ("ok", "1", torch.__version__)
    assert peers.UNROLL in table(rows)

    record = Record(tmp_path / "benchmarks.csv")
    record.replace(TINY, rows)
    record.replace(TINY, rows)
    again = Record(tmp_path / "benchmarks.csv")
    assert again.rows == rows
    assert again.holds(TINY, rows[0]["revision"], 1)
    assert not again.holds(TINY, "another", 1)
    assert not again.holds(TINY, rows[0]["revision"], 2)
    assert not again.holds(Cell("tiny", 3, "thresholds"), rows[0]["revision"], 1)


def test_memory_alone_has_one_step_for_a_time() -> None:
    bench = run.Bench([peers.UNROLL], threads=1, budget=0.1, limit=300.0, jax=None, in_turns=False)
    (row,) = bench.measure(Cell("tiny", 3, "mapped"))
    assert (row["status"], row["rounds"], row["vs_plain"]) == ("ok", "1", "")
    assert float(row["median_ms"]) > 0 and float(row["peak_mib"]) > 0


def test_figures(rows: list[dict[str, str]], tmp_path: Path) -> None:
    none = [row | {"unroll_steps": "0", "peak_mib": "100"} for row in rows]
    more = [row | {"peak_mib": "150"} for row in rows]
    assert above_no_steps(more[1], [*none, *more]) == 50.0
    assert above_no_steps(more[1], more) is None
    draw([*none, *more, *(row | {"unroll_steps": "20"} for row in more)], tmp_path)
    for name in ("time", "memory"):
        assert (tmp_path / f"benchmark_{name}.png").stat().st_size > 1000


def test_too_much_time_or_memory_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    python = [sys.executable, "-c"]
    with pytest.raises(run.OverBudget, match="over 1 s"):
        run.last_line([*python, "import time; time.sleep(60)"], {}, 1.0)
    with pytest.raises(run.OverBudget, match="out of memory"):
        run.last_line([*python, "raise MemoryError"], {}, None)
    with pytest.raises(RuntimeError, match="division by zero"):
        run.last_line([*python, "1 / 0"], {}, None)

    calls = []

    def refused(*arguments: object) -> None:
        calls.append(arguments)
        raise run.OverBudget("over 1 s")

    monkeypatch.setattr(run, "last_line", refused)
    bench = run.Bench([peers.UNROLL], threads=1, budget=0.1, limit=1.0, jax=None)
    (row,) = bench.measure(TINY)
    assert (row["status"], row["median_ms"], len(calls)) == ("over 1 s", "", 1)
    bench.measure(Cell("tiny", 5, "default"))  # longer: not even tried
    assert len(calls) == 1
    bench.measure(Cell("tiny", 1, "default"))
    assert len(calls) == 2
