"""The LSTM of Appendix C: its networks, runs that survive, and what the page says of them."""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets.mnist import MNIST

from tests.test_examples import example, rows

TINY = {"samples": 40, "width": 8, "noise_size": 4, "batch_size": 4, "evaluate_every": 2}


@pytest.fixture
def rnn(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("rnn_mnist", monkeypatch)


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Return a folder with an MNIST of 64 random digits."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, _ in MNIST.resources:
        kind = name.removesuffix(".gz")
        shape = (64, 28, 28) if "images" in kind else (64,)
        values = random.integers(0, 256 if "images" in kind else 10, shape, dtype=np.uint8)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        (raw / kind).write_bytes(header + values.tobytes())
    return tmp_path / "data"


@pytest.fixture
def classifier_file(rnn: Any, tmp_path: Path) -> Path:
    """Return an untrained classifier."""
    widths = (2, 2, 2)
    path = tmp_path / "classifier.pt"
    facts = {"widths": widths, "test_accuracy": 10.0}
    rnn.classifier.save(path, rnn.classifier.network(widths), facts)
    return path


def command(
    rnn: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, **settings: object
) -> None:
    """Run the example in this process, on a tiny preset."""
    small = replace(rnn.PRESETS["small"], **{**TINY, "record_every": 2, **settings})
    monkeypatch.setitem(rnn.PRESETS, "small", small)
    monkeypatch.setattr(sys, "argv", ["rnn_mnist.py", *map(str, arguments), "--workers", "1"])
    rnn.main()


def test_the_generator_is_an_lstm_that_starts_from_the_noise_and_emits_columns(rnn: Any) -> None:
    generator = rnn.lstm.Generator(6, 5, "both", torch.Generator().manual_seed(0))
    z = torch.randn(3, 6)
    cell = nn.LSTMCell(1, 5)
    cell.load_state_dict(
        {name.removesuffix("_l0"): value for name, value in generator.lstm.state_dict().items()}
    )
    hidden = memory = torch.relu(z @ generator.first.weight.T + generator.first.bias)
    columns = []
    for _ in range(28):
        hidden, memory = cell(torch.zeros(3, 1), (hidden, memory))
        columns.append(torch.tanh(generator.last(hidden)))
    images = generator(z)
    assert images.shape == (3, 1, 28, 28)
    torch.testing.assert_close(images[:, 0], torch.stack(columns, dim=2))  # columns, not rows


@pytest.mark.parametrize("state", ["hidden", "cell"])
def test_the_noise_may_become_either_part_of_the_state_alone(rnn: Any, state: str) -> None:
    generator = rnn.lstm.Generator(6, 5, state, torch.Generator().manual_seed(0))
    z = torch.randn(3, 6)
    noise = generator.first(z).relu()[None]
    states = [noise if name == state else torch.zeros_like(noise) for name in ("hidden", "cell")]
    columns, _ = generator.lstm(torch.zeros(3, 28, 1), tuple(states))
    torch.testing.assert_close(generator(z)[:, 0], generator.last(columns).tanh().mT)


def test_the_networks_are_those_of_appendix_c(rnn: Any) -> None:
    config = rnn.PRESETS["paper"]
    size = config.noise_size, config.width, config.initial_state
    generator = rnn.lstm.Generator(*size, torch.Generator().manual_seed(0))
    biases = generator.lstm.bias_ih_l0 + generator.lstm.bias_hh_l0
    _, forget, *_ = biases.detach().view(4, 256)  # gates i, f, g, o
    assert forget.unique().tolist() == [1.0]
    assert biases.sum().item() == 256
    assert generator.first.weight.shape == (256, 256)
    bound = (6 / (256 + 4 * 256)) ** 0.5  # Glorot's, uniform
    assert 0.99 * bound < generator.lstm.weight_hh_l0.abs().max().item() <= bound

    d = rnn.lstm.discriminator(torch.Generator().manual_seed(0))
    kinds = [type(layer) for layer in d]
    assert kinds == [*[nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU] * 3, nn.Flatten, nn.Linear]
    assert [(d[i].out_channels, d[i].stride) for i in (0, 3, 6)] == [
        (16, (2, 2)),
        (32, (2, 2)),
        (32, (2, 2)),
    ]
    assert d(torch.zeros(2, 1, 28, 28)).shape == (2, 1)


def checkpoint(rnn: Any, folder: Path, data_root: Path, file: Path, *lengths: int) -> Any:
    """Train to each length, resuming, and return the checkpoint."""
    for number, pairs in enumerate(lengths):
        config = replace(rnn.PRESETS["small"], **TINY, unroll_steps=2, pairs=pairs)
        rnn.train(
            config,
            0,
            folder=folder,
            resume=number > 0,
            data_root=data_root,
            classifier_file=file,
        )
    return torch.load(config.checkpoint(folder), weights_only=True)


def same(one: Any, other: Any) -> bool:
    """Say whether two checkpoints hold the same, timings apart."""
    for content in (one, other):
        for row in content["log"]["history"]:
            row.pop("seconds", None)
            row.pop("cpu_seconds", None)
    return (
        one["log"]["history"] == other["log"]["history"]
        and torch.equal(one["rng"], other["rng"])
        and all(
            torch.equal(value, other["parts"][part][name])
            for part in "gd"
            for name, value in one["parts"][part].items()
        )
        and all(map(torch.equal, one["log"]["snapshots"], other["log"]["snapshots"]))
    )


@pytest.mark.filterwarnings("ignore:.*non-writable:UserWarning")
def test_a_run_resumes_to_the_same_numbers(
    rnn: Any, data_root: Path, classifier_file: Path, tmp_path: Path
) -> None:
    once = checkpoint(rnn, tmp_path / "once", data_root, classifier_file, 5)
    again = checkpoint(rnn, tmp_path / "again", data_root, classifier_file, 3, 5)
    assert same(once, again)


def test_a_run_that_is_killed_between_evaluations_resumes_to_the_same_numbers(
    rnn: Any,
    data_root: Path,
    classifier_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    once = checkpoint(rnn, tmp_path / "once", data_root, classifier_file, 5)
    monkeypatch.setattr(rnn.runs, "SECONDS_AT_RISK", -1)
    monkeypatch.setattr(rnn.runs, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    sample, drawn = rnn.digits.Digits.sample, 0

    def killed(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 8:  # two batches a pair: in the fourth
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(rnn.digits.Digits, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint(rnn, tmp_path / "again", data_root, classifier_file, 5)
    (path,) = (tmp_path / "again" / "checkpoints").glob("*.pt")
    assert torch.load(path, weights_only=True)["log"]["since"][0] == 3
    drawn = 100
    config = replace(rnn.PRESETS["small"], **TINY, unroll_steps=2, pairs=5)
    rnn.train(
        config,
        0,
        folder=tmp_path / "again",
        resume=True,
        data_root=data_root,
        classifier_file=classifier_file,
    )
    assert same(once, torch.load(path, weights_only=True))


def test_it_records_draws_and_goes_on_at_k_0(
    rnn: Any,
    data_root: Path,
    classifier_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record, out = tmp_path / "record.csv", tmp_path / "out"
    files = ("--data-root", data_root, "--classifier", classifier_file)
    where = ("--out", out, "--record", record)
    steps = ("--unroll-steps", "0", "1", "--iterations", "3", "--standard-iterations", "6")
    command(rnn, monkeypatch, *steps, *files, *where)
    found = [(row["unroll_steps"], row["pairs"], row["player_updates"]) for row in rows(record)]
    assert found == [
        ("1", "2", "4"),
        ("1", "3", "6"),
        ("0", "2", "4"),
        ("0", "4", "8"),
        ("0", "6", "12"),
    ]
    assert {row["classifier"] for row in rows(record)} == {
        rnn.classifier.facts(classifier_file)["hash"]
    }
    assert len(rows(out / "metrics.csv")) == 7  # at 0, 2, 3 and at 0, 2, 4, 6
    for name in ("rnn_mnist.png", "rnn_mnist_curves.png", "rnn_mnist_costs.png"):
        assert (out / name).stat().st_size > 0
    assert "After 3 pairs" in capsys.readouterr().out

    (tmp_path / "section.csv").write_text(record.read_text())
    refused = {
        ("--out must not hold the run already", "--resume"): steps,
        ("cannot be resumed", "learning_rate 0.001, not 0.1"): (
            *(*steps, "--resume"),
            *("--learning-rate", "0.1"),
        ),
    }
    for parts, arguments in refused.items():
        with pytest.raises(SystemExit):
            command(rnn, monkeypatch, *arguments, *files, *where)
        error = capsys.readouterr().err
        assert all(part in error for part in parts), error
    checkpoints = sorted((out / "checkpoints").iterdir())
    checkpoints[0].write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        command(rnn, monkeypatch, *steps, "--resume", *files, *where)
    assert f"{checkpoints[0]} cannot be read" in capsys.readouterr().err
    assert checkpoints[0].read_bytes() == b"damaged"
    assert record.read_text() == (tmp_path / "section.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--unroll-steps", "-1"), "--unroll-steps must not be negative, got -1"),
        (("--iterations", "0"), "--iterations must be positive, got 0"),
        (("--learning-rate", "-1"), "--learning-rate must be positive, got -1"),
        (("--data-root", "nowhere"), "--data-root"),
        (("--classifier", "nowhere"), "--classifier must be a trained classifier"),
        (("--out", "file/out"), "--out must be in a folder that can be written to"),
        (("--record", "file/record.csv"), "--record must be in a folder that can be written to"),
    ],
)
def test_it_refuses_what_it_cannot_do_before_any_work(
    rnn: Any,
    arguments: tuple[str, str],
    message: str,
    data_root: Path,
    classifier_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    files = ("--data-root", data_root, "--classifier", classifier_file)
    with pytest.raises(SystemExit) as refused:
        command(rnn, monkeypatch, *files, *arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.csv"))


def row(k: int, seed: int, pairs: int, entropy: float, **others: object) -> dict[str, object]:
    """Return a row of a record."""
    return {
        "preset": "small",
        "unroll_steps": k,
        "samples": 500,
        "classifier_accuracy": 99.4,
        "learning_rate": 0.001,
        "batch_size": 16,
        "evaluate_every": 10,
        "seed": seed,
        "pairs": pairs,
        "classes": 10 if entropy > 2 else 2,
        "class_entropy": entropy,
        "largest_mode_changes": 3,
        "rotations": 15 * (k == 0) + seed,
        "spread": 0.5 if k else 0.1,
        "cpu_seconds": pairs / 10 * (10 if k else 1),
    } | others


def page_of(page: Any, folder: Path, found: list[dict[str, object]]) -> str:
    """Return the section on a record of these rows."""
    with (folder / "rnn_mnist.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    text: str = page.rnn_mnist(folder)
    return text
