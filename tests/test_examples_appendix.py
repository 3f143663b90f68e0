"""The experiments of Appendix B: what they train is what `mog.py` trains, seed by seed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_examples import example, rows, run

SHORT = {"pairs": 4, "batch_size": 32, "samples": 50, "evaluate_every": 2, "seeds": 2}
ARMS: dict[str, list[dict[str, Any]]] = {
    "mog_history": [
        {"members": 3, "delay": 2},
        {"members": 3, "delay": 2, "live": False},
        {"unroll_steps": 2},
    ],
    "mog_second_gradient": [
        {"unroll_steps": 2},
        {"unroll_steps": 2, "stop_gradient": True, "average": True, "generator_steps": 2},
    ],
}
EVERY = [(name, arm) for name, arms in ARMS.items() for arm in arms]


def trained(
    name: str, folder: Path, patch: pytest.MonkeyPatch, *lengths: int, **settings: Any
) -> dict[str, Any]:
    """Train an arm to each length, resuming, and return its checkpoint."""
    module = example(name, patch)
    for number, pairs in enumerate(lengths):
        config = replace(module.PRESETS["quick"], **{**SHORT, **settings, "pairs": pairs})
        module.train(config, 0, folder=folder, resume=number > 0)
    content: dict[str, Any] = torch.load(config.checkpoint(folder), weights_only=True)
    return content


@pytest.mark.parametrize(("name", "arm"), EVERY)
def test_an_arm_resumes_to_the_same_numbers(
    name: str, arm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = trained(name, tmp_path / "once", monkeypatch, 6, **arm)
    again = trained(name, tmp_path / "again", monkeypatch, 3, 6, **arm)
    for content in (once, again):
        for row in content["log"]["history"]:
            del row["seconds"]
    assert str(once["log"]["history"]) == str(again["log"]["history"])  # of NaNs too
    assert torch.equal(once["rng"], again["rng"])
    for part, state in once["parts"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, again["parts"][part][key])


@pytest.mark.parametrize(("name", "arm"), EVERY)
def test_a_seed_of_an_arm_trains_among_others_as_it_does_alone(
    name: str, arm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained(name, tmp_path / "three", monkeypatch, 4, seeds=3, **arm)
    alone = trained(name, tmp_path / "one", monkeypatch, 4, seeds=1, first_seed=1, **arm)
    for part in "gd":
        for key, parameters in alone["parts"][part].items():
            others = together["parts"][part][key]
            assert (parameters[0] - others[1]).abs().max() < 1e-5, key
            assert (parameters[0] - others[0]).abs().max() > 1e-4, f"{key}: one for all seeds"
    own, among = (content["log"]["history"][-1]["each"] for content in (alone, together))
    if "second_term" in own[0]:
        assert own[0]["second_term"] == pytest.approx(among[1]["second_term"], rel=1e-3)
        assert own[0]["second_term"] != pytest.approx(among[0]["second_term"], rel=1e-3)


MOG: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mog_history", {"members": 1}, {"unroll_steps": 0}),
    ("mog_history", {"unroll_steps": 3}, {"unroll_steps": 3}),
    *(
        ("mog_second_gradient", arm, arm)
        for arm in (
            {"unroll_steps": 2, "generator_steps": 2},
            {"unroll_steps": 3, "stop_gradient": True},
            {"unroll_steps": 3, "stop_gradient": True, "average": True},
        )
    ),
]


@pytest.mark.parametrize(("name", "arm", "same"), MOG)
def test_a_seed_trains_as_in_the_experiment_of_the_paper(
    name: str,
    arm: dict[str, Any],
    same: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arm = {"first_seed": 4, "learning_rate": 1e-3, **arm}
    found = trained(name, tmp_path / "arm", monkeypatch, 4, **arm)["parts"]
    mog = example("mog", monkeypatch)
    shared = {key: value for key, value in SHORT.items() if key != "seeds"}
    config = replace(mog.PRESETS["quick"], **shared, **same, seed=5)
    mog.train(config, 0, folder=tmp_path / "mog", resume=False)
    parts = torch.load(config.checkpoint(tmp_path / "mog"), weights_only=True)["parts"]
    for part in "gd":
        pairs = zip(found[part].values(), parts[part].values(), strict=True)
        for ours, theirs in pairs:
            assert (ours[1].reshape(theirs.shape) - theirs).abs().max() < 1e-5


def test_an_ensemble_holds_the_discriminators_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    mog_history = example("mog_history", monkeypatch)
    seeds = example("lab.seeds", monkeypatch)
    network = seeds.perceptrons([2, 1], "relu", seeds.Generators([0, 1], "cpu"))
    x = torch.ones(2, 2, 3)

    def held(updates: int, **settings: Any) -> list[int]:
        """Return after which updates the members were taken."""
        ensemble = mog_history.Ensemble(network, **settings)
        for update in range(updates):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.fill_(update)
            ensemble.follow()
        logits = ensemble(x).reshape(len(ensemble), 2, 3)
        assert (logits == logits[:, :1, :1]).all()
        return sorted((logits[:, 0, 0] / 3).int().tolist())

    assert held(1, members=3, delay=1) == [0]
    assert held(5, members=3, delay=1) == [2, 3, 4]
    assert held(5, members=3, delay=1, live=False) == [2, 3, 4]
    assert held(6, members=2, delay=3) == [2, 5]
    assert held(8, members=2, delay=3) == [5, 7]
    assert held(8, members=2, delay=3, live=False) == [3, 6]
    assert held(2, members=2, delay=3, live=False) == [0]


def test_history_records_a_row_a_seed_and_draws(tmp_path: Path) -> None:
    record = tmp_path / "record.csv"
    arms = ("--members", "1", "5", "--delays", "3", "--unroll-steps", "1")
    command = ("--iterations", "2", "--seeds", "2", "--workers", "1", *arms)
    finished = run("mog_history.py", *command, "--out", tmp_path / "out", "--record", record)
    assert finished.returncode == 0, finished.stderr
    columns = ("unroll_steps", "members", "delay", "live")
    found = {tuple(row[name] for name in columns) for row in rows(record)}
    assert found == {
        ("0", "1", "1", "True"),
        ("0", "5", "1", "True"),
        ("0", "5", "3", "True"),
        ("0", "5", "3", "False"),
        ("1", "1", "1", "True"),
    }
    assert len(rows(record)) == 10
    for name in ("ensembles", "delays", "sampled"):
        assert (tmp_path / "out" / f"mog_history_{name}.png").stat().st_size > 0


def test_second_gradient_records_a_row_a_seed_and_draws(tmp_path: Path) -> None:
    record = tmp_path / "record.csv"
    command = ("--iterations", "6", "--seeds", "2", "--unroll-steps", "1", "2", "--workers", "1")
    script = "mog_second_gradient.py"
    finished = run(script, *command, "--out", tmp_path / "out", "--record", record)
    assert finished.returncode == 0, finished.stderr
    found = rows(record)
    assert len(found) == 24
    assert {(row["generator_steps"], row["pairs"]) for row in found} == {("1", "6"), ("5", "2")}
    assert {row["player_updates"] for row in found} == {"12"}
    arms = {(row["stop_gradient"], row["average"]) for row in found}
    assert arms == {("False", "False"), ("True", "False"), ("True", "True")}
    one = [row for row in found if row["unroll_steps"] == "1" and row["stop_gradient"] == "True"]
    first, averaged = ([r for r in one if r["average"] == a] for a in ("False", "True"))
    assert [r | {"average": "True"} for r in first] == averaged  # the same at K=1
    for steps in "15":
        for gradient in ("full", "first", "averaged"):
            for name in (gradient, f"{gradient}_curves"):
                figure = tmp_path / "out" / f"mog_second_gradient_{steps}_{name}.png"
                assert figure.stat().st_size > 0


def test_late_metrics_are_means_over_the_last_third(monkeypatch: pytest.MonkeyPatch) -> None:
    appendix = example("lab.appendix", monkeypatch)
    history = [
        {
            "pairs": pairs,
            "each": [dict.fromkeys(appendix.LATE, float(pairs * seed)) for seed in (1, 2)],
        }
        for pairs in (0, 2, 4, 5, 6)
    ]
    log = {"history": history, "provenance": {"revision": "none"}}
    found = appendix.record_rows("name", appendix.Settings(pairs=6, seeds=2), log)
    assert [row["late_modes"] for row in found] == [5.0, 10.0]
    assert [row["modes"] for row in found] == [6.0, 12.0]
    assert [row["seed"] for row in found] == [0, 1]


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        ("mog_history.py", "--members", "0"),
        ("mog_history.py", "--delays", "-1"),
        ("mog_history.py", "--unroll-steps", "-1"),
        ("mog_history.py", "--iterations", "0"),
        ("mog_second_gradient.py", "--unroll-steps", "-1"),
        ("mog_second_gradient.py", "--iterations", "0"),
        ("mog_second_gradient.py", "--generator-steps", "0"),
    ],
)
def test_they_refuse_what_cannot_be_trained(
    script: str, flag: str, value: str, tmp_path: Path
) -> None:
    refused = run(script, flag, value, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert flag in refused.stderr.splitlines()[-1]
    assert value in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
