"""The experiments run from the command line, and resume to the same numbers."""

import csv
import importlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


SIDE_BY_SIDE: dict[str, dict[str, Any]] = {
    "two_clusters": {"game": "Rp", "start": "collapsed"},
    "five_gaussians": {"game": "JS", "normalise": True},
    "mog_nonuniform": {"weight_deviation": 0.06},
}


def trained(
    name: str, folder: Path, *lengths: int, seeds: int, first: int, patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Train an experiment to each length, resuming, and return its checkpoint."""
    module = example(name, patch)
    patch.setattr(module, "ALONE", 5, raising=False)
    length = "epochs" if name == "two_clusters" else "pairs"
    for number, until in enumerate(lengths):
        settings = {**SIDE_BY_SIDE[name], length: until, "first_seed": first, "seeds": seeds}
        config = replace(module.PRESETS["quick"], unroll_steps=2, evaluate_every=2, **settings)
        module.train(config, 0, folder=folder, resume=number > 0)
    content: dict[str, Any] = torch.load(config.checkpoint(folder), weights_only=True)
    return content


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_seeds_side_by_side_resume_to_the_same_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = trained(name, tmp_path / "once", 6, seeds=2, first=0, patch=monkeypatch)
    again = trained(name, tmp_path / "again", 3, 6, seeds=2, first=0, patch=monkeypatch)
    for content in (once, again):
        for row in content["log"]["history"]:
            del row["seconds"]
    assert str(once["log"]["history"]) == str(again["log"]["history"])  # of NaNs too
    assert torch.equal(once["rng"], again["rng"])
    for part in "gd":
        for key, parameters in once["parts"][part].items():
            assert torch.equal(parameters, again["parts"][part][key])


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_a_seed_trains_among_others_as_it_does_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained(name, tmp_path / "three", 3, seeds=3, first=0, patch=monkeypatch)["parts"]
    alone = trained(name, tmp_path / "one", 3, seeds=1, first=1, patch=monkeypatch)["parts"]
    for part in "gd":
        for key, parameters in alone[part].items():
            others = together[part][key]
            assert (parameters[0] - others[1]).abs().max() < 1e-5, key
            assert (parameters[0] - others[0]).abs().max() > 1e-3, f"{key}: one for all seeds"


def test_their_command_line_records_a_row_a_seed_and_draws(tmp_path: Path) -> None:
    record = tmp_path / "record.csv"
    command = ("--epochs", "3", "--seeds", "2", "--unroll-steps", "0", "1", "--workers", "1")
    finished = run("two_clusters.py", *command, "--out", tmp_path / "out", "--record", record)
    assert finished.returncode == 0, finished.stderr
    found = [(row["game"], row["unroll_steps"], row["seed"]) for row in rows(record)]
    assert sorted(found) == [(g, k, s) for g in ("JS", "Rp") for k in "01" for s in "01"]
    for name in ("two_clusters_loss.png", "two_clusters_data.png", "two_clusters_d.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    settings = {(row["setting"], row["seed"]) for row in rows(tmp_path / "out" / "metrics.csv")}
    assert len(settings) == 8


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("two_clusters.py", ("--unroll-steps", "-1")),
        ("two_clusters.py", ("--epochs", "0")),
        ("two_clusters.py", ("--games", "LS")),
        ("five_gaussians.py", ("--unroll-steps", "-1")),
        ("five_gaussians.py", ("--iterations", "0")),
        ("five_gaussians.py", ("--width", "0")),
        ("mog_nonuniform.py", ("--unroll-steps", "-1")),
        ("mog_nonuniform.py", ("--iterations", "0")),
        ("mog_nonuniform.py", ("--weights", "0.5")),
    ],
)
def test_they_refuse_bad_arguments_before_any_work(
    script: str,
    arguments: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = example(script.removesuffix(".py"), monkeypatch).main
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    flag, value = arguments
    error = capsys.readouterr().err
    assert flag in error.splitlines()[-1]
    assert value in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_plateaus_of_two_clusters_are_the_best_losses_at_a_collapsed_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two_clusters = example("two_clusters", monkeypatch)
    for name, game in two_clusters.GAMES.items():
        values = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # f at each cluster
        optimizer = torch.optim.Adam([values], lr=0.1)
        where = torch.tensor([0, 1]).repeat(50)  # of the real samples, by turns
        for _ in range(1000):
            loss = game.discriminator_loss(lambda i, f=values: f[i], torch.zeros_like(where), where)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert abs(loss.item() - two_clusters.PLATEAU[name]) < 1e-3
    assert round(two_clusters.PLATEAU["JS"], 4) == 0.4774


def test_two_clusters_tells_collapsed_from_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    two_clusters = example("two_clusters", monkeypatch)

    def look(first: int, second: int, loss: float, earlier: list[dict[str, int]]) -> dict[str, int]:
        places = [0.2] * first + [4.2] * second + [2.0] * (100 - first - second)
        row = {"d_loss": loss, **two_clusters.counts(torch.tensor([places]))}
        found: dict[str, int] = two_clusters.landmarks(10 * len(earlier), row, earlier, "JS")
        return found

    history: list[dict[str, int]] = []
    for state in ((95, 0, 0.47), (95, 0, 0.6), (90, 1, 0.4774), (40, 25, 0.69), (100, 0, 0.48)):
        history.append(look(*state, history))
    assert [row["collapsed"] for row in history] == [1, 2, 2, 2, 3]
    assert [row["on_plateau"] for row in history] == [1, 1, 1, 1, 2]
    assert [row["covers"] for row in history] == [0, 0, 0, 1, 0]
    assert [row["covered_at"] for row in history] == [-1, -1, -1, 30, 30]


def test_the_weights_have_the_deviations_that_they_are_named_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mog_nonuniform = example("mog_nonuniform", monkeypatch)
    for deviation in mog_nonuniform.WEIGHTS:
        weights = torch.tensor(mog_nonuniform.weights(deviation))
        assert abs(weights.sum().item() - 1) < 1e-6
        assert abs(weights.std(unbiased=False).item() - deviation) < 5e-4


def test_the_normalised_layer_is_the_last_of_d(monkeypatch: pytest.MonkeyPatch) -> None:
    five_gaussians = example("five_gaussians", monkeypatch)
    seeds = importlib.import_module("lab.seeds")
    rngs = seeds.Generators([0, 1], "cpu")
    d = seeds.perceptrons([2, 8, 8, 1], "leaky_relu", rngs, last_bias=False)
    names = [name for name, _ in d.named_parameters()]
    assert names[-1] == five_gaussians.LAST
    normalised = five_gaussians.normalised(dict(d.named_parameters()))
    assert torch.allclose(normalised[names[-1]].norm(dim=-1), torch.ones(2, 1))
    assert all(normalised[name] is p for name, p in d.named_parameters() if name != names[-1])


def test_seconds_are_those_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = example("lab.runs", monkeypatch)
    rng = torch.Generator()

    def wait(_: int, __: Any) -> tuple[dict[str, Any], None]:
        time.sleep(0.3)
        return {}, None

    settings = {"length": 1, "every": 1, "resume": False, "bar": {"disable": True}}
    list(runs.iterate(tmp_path / "run.pt", {}, {}, rng, wait, **settings))
    assert runs.read_log(tmp_path / "run.pt")["history"][-1]["seconds"] < 0.3
