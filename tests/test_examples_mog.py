"""The seeds of mog.py side by side: as alone, resumed to the same numbers, and judged fairly."""

import csv
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = {"batch_size": 16, "samples": 30, "width": 16, "evaluate_every": 2}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"unroll_steps": 2},
    "fresh": {"unroll_steps": 2, "resample": True},
    "real steps": {"unroll_steps": 0, "discriminator_steps": 3},
    "notebook": {"unroll_steps": 1, "activation": "tanh", "discriminator_layers": 2, "gain": 1.4},
}


@pytest.fixture
def mog_seeds(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("mog_seeds")


def config(mog_seeds: Any, **settings: Any) -> Any:
    quick = asdict(mog_seeds.mog.PRESETS["quick"])
    return mog_seeds.Config(**quick | SMALL | {"pairs": 4, "seeds": 3} | settings)


def log(mog_seeds: Any, settings: Any, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    mog_seeds.train(settings, 0, folder=folder, resume=resume)
    found: dict[str, Any] = mog_seeds.runs.read_log(settings.checkpoint(folder))
    for row in found["history"]:
        del row["seconds"]
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_a_seed_is_the_run_of_mog_alone(arm: str, mog_seeds: Any, tmp_path: Path) -> None:
    together = config(mog_seeds, **ARMS[arm])
    samples = log(mog_seeds, together, tmp_path)["snapshots"][-1]
    for seed in range(3):
        settings = {n: getattr(together, n) for n in mog_seeds.mog.Config.__match_args__}
        alone = mog_seeds.mog.Config(**settings | {"seed": seed})
        expected = log(mog_seeds.mog, alone, tmp_path)["snapshots"][-1]
        assert (samples[seed] - expected).abs().max() < 1e-5
    assert (samples[0] - samples[1]).abs().max() > 1e-2


def test_rates_fall_by_their_half_life_and_resume(mog_seeds: Any, tmp_path: Path) -> None:
    whole = config(mog_seeds, unroll_steps=1, half_life=2)
    once = log(mog_seeds, whole, tmp_path / "once")
    log(mog_seeds, replace(whole, pairs=3), tmp_path / "again")
    again = log(mog_seeds, whole, tmp_path / "again", resume=True)
    assert str(once["history"]) == str(again["history"])  # of NaNs too
    content = torch.load(whole.checkpoint(tmp_path / "once"), weights_only=True)
    for adam, rate in (("g_adam", whole.generator_lr), ("d_adam", whole.discriminator_lr)):
        assert content["parts"][adam]["param_groups"][0]["lr"] == rate / 4


def test_the_grid_has_25_modes_at_even_distances(mog_seeds: Any) -> None:
    mixture = mog_seeds.data(config(mog_seeds, mixture="grid", radius=4.0, deviation=0.05))
    assert len(mixture.means) == len({tuple(mean.tolist()) for mean in mixture.means}) == 25
    assert sorted(set(mixture.means.flatten().tolist())) == [-4, -2, 0, 2, 4]
    assert mixture.deviation == 0.05


def test_what_is_compared(mog_seeds: Any) -> None:
    def arms(*arguments: str) -> Iterator[tuple[int, bool, int]]:
        given = vars(mog_seeds.arguments().parse_args([*arguments]))
        for c in mog_seeds.build({n: v for n, v in given.items() if v is not None}):
            yield c.unroll_steps, c.resample, c.discriminator_steps

    assert list(arms()) == [(0, False, 1), (10, False, 1)]
    assert list(arms("--compare", "minibatches", "--unroll-steps", "5")) == [
        (5, False, 1),
        (5, True, 1),
    ]
    assert list(arms("--compare", "real-steps", "--unroll-steps", "5", "10")) == [
        (0, False, 1),
        (0, False, 5),
        (0, False, 10),
        (5, False, 1),
        (10, False, 1),
    ]


def test_the_command_line_records_a_row_a_seed_and_draws(tmp_path: Path) -> None:
    record = tmp_path / "record.csv"
    small = ("--iterations", "3", "--batch-size", "8", "--samples", "30", "--seeds", "2")
    command: list[str | Path] = [
        sys.executable,
        EXAMPLES / "mog_seeds.py",
        "--mixture",
        "grid",
        *small,
    ]
    command += ["--workers", "1", "--unroll-steps", "0", "1"]
    out = tmp_path / "out"
    finished = subprocess.run(
        [*command, "--out", out, "--record", record], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    with record.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = sorted((row["mixture"], row["unroll_steps"], row["seed"]) for row in rows)
    assert found == [("grid", k, seed) for k in "01" for seed in "01"]
    for name in ("mog_seeds_quick_grid.png", "mog_seeds_quick_grid_curves.png", "metrics.csv"):
        assert (out / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--unroll-steps", "-1"), ("--iterations", "0"), ("--mixture", "no"), ("--half-life", "0")],
)
def test_it_refuses_bad_arguments_before_any_work(
    flag: str,
    value: str,
    mog_seeds: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["mog_seeds.py", flag, value, "--out", str(out)])
    with pytest.raises(SystemExit) as refused:
        mog_seeds.main()
    assert refused.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert flag in error
    assert value in error
    assert not out.exists()
