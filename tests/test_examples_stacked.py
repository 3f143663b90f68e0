"""The thousand modes: the networks, the command, resuming, the record; what pairs cost."""

import csv
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_mnist

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ("--iterations", "2", "--samples", "40", "--batch-size", "4", "--evaluate-every", "1")


@pytest.fixture(name="load")
def _load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture(name="files")
def _files(load: Callable[[str], Any], tmp_path: Path) -> dict[str, Path]:
    """Make data and an untrained classifier."""
    classifier = load("lab.metrics.classifier")
    path = tmp_path / "classifier.pt"
    facts = {"widths": list(classifier.WIDTHS), "test_accuracy": 10.0}
    classifier.save(path, classifier.network(), facts)
    return {"data_root": tiny_mnist.write(tmp_path / "data"), "classifier_file": path}


@pytest.fixture(name="command")
def _command(
    load: Callable[[str], Any], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    def run(*arguments: object, script: str = "stacked_mnist") -> None:
        flags = ("--data-root", files["data_root"], "--classifier", files["classifier_file"])
        monkeypatch.setattr(sys, "argv", list(map(str, (script, *flags, *arguments))))
        load(script).main()

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_networks_are_those_of_appendix_e(load: Callable[[str], Any]) -> None:
    stacked_mnist = load("stacked_mnist")
    rng = torch.Generator().manual_seed(0)
    for x, size, widths in ((0.25, 28, (2, 4, 8)), (0.5, 32, (4, 8, 16))):
        config = replace(stacked_mnist.PRESETS["paper"], size=x, image_size=size)
        g, d = stacked_mnist.networks(config, rng)
        images = g(torch.randn(2, 256))
        assert images.shape == (2, 3, size, size)
        assert images.abs().max() <= 1
        assert d(images).shape == (2, 1)
        convolutions = [p.shape for name, p in d.named_parameters() if p.ndim == 4]
        assert [shape[0] for shape in convolutions] == list(widths)
        maps = [p.shape[0] for p in g.parameters() if p.ndim == 4]
        assert maps == [64, 32, 16, 8]
    config = replace(stacked_mnist.PRESETS["paper"], networks="D", size=1.0)
    _, d = stacked_mnist.networks(config, rng)
    assert [p.shape[0] for p in d.parameters() if p.ndim == 4] == [64, 128, 256]


def test_the_command_records_every_evaluation_and_draws(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, out = tmp_path / "record.csv", tmp_path / "out"
    command(*SMALL, "--unroll-steps", 0, 1, "--workers", 1, "--out", out, "--record", record)
    assert "D = 1/2, K = 1" in capsys.readouterr().out
    found = [(row["size"], row["unroll_steps"], row["pairs"]) for row in rows(record)]
    assert sorted(found) == [(x, k, n) for x in ("0.25", "0.5") for k in "01" for n in "12"]
    for row in rows(record):
        assert 1 <= int(row["curve_modes"]) <= 40
        assert math.log(1000 / 40) - 1e-6 <= float(row["curve_reverse_kl"]) < math.log(1000) + 1e-6
        last = (row["curve_modes"], row["curve_reverse_kl"]) if row["pairs"] == "2" else ("", "")
        assert (row["modes"], row["reverse_kl"]) == last  # of the same 40 samples
        assert row["player_updates"] == str(2 * int(row["pairs"]))
    assert (out / "stacked_mnist_small_E.png").stat().st_size > 0
    longer = ("--iterations", 3, *SMALL[2:], "--unroll-steps", 0, "--sizes", "1/4")
    command(*longer, "--resume", "--out", out, "--record", record)
    assert len(rows(record)) == 9


def test_it_resumes_to_the_same_numbers(
    load: Callable[[str], Any], files: dict[str, Path], tmp_path: Path
) -> None:
    stacked_mnist = load("stacked_mnist")
    small = {"samples": 40, "batch_size": 4, "evaluate_every": 1, "unroll_steps": 2}
    config = replace(stacked_mnist.PRESETS["small"], **small)
    contents = []
    for lengths in ((4,), (2, 4)):
        folder = tmp_path / str(len(lengths))
        for pairs in lengths:
            last = replace(config, pairs=pairs)
            stacked_mnist.train(last, 0, folder=folder, resume=True, **files)
        contents.append(torch.load(last.checkpoint(folder), weights_only=True))
    once, again = contents
    for content in contents:
        for row in content["log"]["history"]:
            del row["seconds"]
        for row in content["log"]["history"][:-1]:  # of all samples at the end of the shorter run
            del row["modes"], row["reverse_kl"]
    assert once["log"]["history"] == again["log"]["history"]
    assert torch.equal(once["rng"], again["rng"])
    for part in "gd":
        for name, value in once["parts"][part].items():
            assert torch.equal(value, again["parts"][part][name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--unroll-steps", "-1"), "--unroll-steps must not be negative, got -1"),
        (("--iterations", "0"), "--iterations must be positive, got 0"),
        (("--sizes", "1/3"), "--sizes must be multiples of 1/8 above zero, got 0.33"),
        (("--generator-lr", "0"), "--generator-lr must be positive"),
        (("--data-root", "nowhere"), "--data-root (or UNROLL_DATA) must be a folder with MNIST"),
        (("--classifier", "no.pt"), "--classifier must be a trained classifier, there is no no.pt"),
        (("--classifier", "no.pt", "--data-score"), "--classifier must be a trained classifier"),
    ],
)
def test_it_refuses_bad_arguments_before_any_work(
    command: Callable[..., None],
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        command(*arguments, "--out", tmp_path / "out")
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_overwrites_nothing_and_refuses_other_settings(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = (*SMALL, "--unroll-steps", 0, "--sizes", "1/2", "--out", tmp_path / "out")
    command(*run)
    for more, message in (
        ((), "--out must not hold the run already"),
        (("--resume", "--generator-lr", 0.5), "cannot be resumed"),
        (("--out", tmp_path / "classifier.pt"), "--out must be in a folder that can be written to"),
    ):
        with pytest.raises(SystemExit):
            command(*run, *more)
        assert message in capsys.readouterr().err


def test_real_stacks_are_scored(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "stacked_mnist.csv"
    command("--data-score", "--seeds", 2, "--samples", 50, "--record", record)
    assert "seed 1: " in capsys.readouterr().out
    scores = rows(tmp_path / "stacked_mnist_data.csv")
    assert [row["seed"] for row in scores] == ["0", "1"]
    assert {row["test_accuracy"] for row in scores} == {"10.0"}


def test_throughput_times_pairs_and_their_data(
    command: Callable[..., None],
    load: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    throughput = load("throughput")
    monkeypatch.setattr(throughput, "STEPS", {"stacked_mnist": (0, 1)})
    record = tmp_path / "throughput.csv"
    arguments = ("--presets", "small", "--pairs", 2, "--record", record)
    command("--experiments", "stacked_mnist", *arguments, script="throughput")
    found = rows(record)
    assert [row["unroll_steps"] for row in found] == ["0", "1"]
    for row in found:
        pair, data = float(row["seconds_a_pair"]), float(row["data_seconds_a_pair"])
        assert 0 < data < pair
        images = int(row["batch_size"]) / pair
        assert float(row["images_a_second"]) == pytest.approx(images)
        assert row["pairs"] == "2"
