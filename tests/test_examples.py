"""The experiments run from the command line, and resume to the same numbers."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TIMINGS = {"seconds"}


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in TIMINGS}
            for row in csv.DictReader(file)
        ]


def test_mog_writes_all_it_promises_and_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    settings = ("--unroll-steps", "0", "2", "--samples", "100", "--workers", "1")
    record = tmp_path / "record.csv"
    whole = run(
        "mog.py", *settings, "--iterations", "60", "--out", tmp_path / "whole", "--record", record
    )
    assert whole.returncode == 0, whole.stderr
    assert "98.89 %" in whole.stdout
    assert "K = 0" in whole.stdout
    assert "K = 2" in whole.stdout
    for name in ("heat_maps.png", "metrics.png", "training.gif", "metrics.csv", "config.json"):
        assert (tmp_path / "whole" / name).stat().st_size > 0
    recorded = rows(record)
    assert [row["unroll_steps"] for row in recorded] == ["2", "0"]
    assert {row["pairs"] for row in recorded} == {"60"}

    parts = ("--out", tmp_path / "parts")
    assert run("mog.py", *settings, "--iterations", "30", *parts).returncode == 0
    assert run("mog.py", *settings, "--iterations", "60", "--resume", *parts).returncode == 0
    assert rows(tmp_path / "whole" / "metrics.csv") == rows(tmp_path / "parts" / "metrics.csv")


@pytest.mark.parametrize(
    "arguments",
    [("--unroll-steps", "-1"), ("--iterations", "0"), ("--preset", "no"), ("--device", "no")],
)
def test_mog_refuses_bad_arguments_before_any_work(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    refused = run("mog.py", *arguments, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert arguments[1].lstrip("-") in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_tables_of_the_pages_follow_from_the_records() -> None:
    checked = run("tables.py", "--check")
    assert checked.returncode == 0, checked.stderr
