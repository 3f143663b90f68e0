"""Adam against SGD on MNIST: its networks, what is measured of D, runs that resume, samples."""

import csv
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the example, on made digits and with a classifier of brightness."""
    monkeypatch.syspath_prepend(EXAMPLES)
    gan_mnist = importlib.import_module("gan_mnist")
    digits, classifier = map(importlib.import_module, ("lab.data.digits", "lab.metrics.classifier"))
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (80, 1, 28, 28), generator=rng, dtype=torch.uint8)
    made = digits.Digits(images, torch.arange(80) % 10)
    monkeypatch.setattr(digits, "mnist", lambda *_, **__: made)
    monkeypatch.setattr(classifier, "load", lambda *_, **__: nn.Identity())
    facts = {"hash": "none", "test_accuracy": 99.5}
    monkeypatch.setattr(classifier, "facts", lambda *_, **__: facts)
    monkeypatch.setattr(
        classifier, "classify", lambda _, x: ((x.mean((1, 2, 3)) + 1) * 5).long().clamp(0, 9)
    )
    return gan_mnist


def settings(example: Any, **changes: Any) -> Any:
    few = {"pairs": 4, "samples": 50, "evaluate_every": 2, "batch_size": 8}
    return replace(example.PRESETS["small"], **few | changes)


def trained(example: Any, folder: Path, *lengths: int, **changes: Any) -> Any:
    for number, pairs in enumerate(lengths):
        config = settings(example, pairs=pairs, **changes)
        example.train(config, 0, folder=folder, resume=number > 0)
    return torch.load(config.checkpoint(folder), weights_only=True)


def test_the_networks_are_that_readmes(example: Any) -> None:
    generator, discriminator = example.generator_of(100, example.EPS), example.discriminator_of()
    widths = [m.out_features for m in generator if isinstance(m, nn.Linear)]
    assert widths == [128, 256, 512, 1024, 784]
    assert {m.eps for m in generator if isinstance(m, nn.BatchNorm1d)} == {0.8}
    assert [m.out_features for m in discriminator if isinstance(m, nn.Linear)] == [512, 256, 1]
    with torch.no_grad():
        images = generator(torch.randn(3, 100))
        verdicts = discriminator(images)
    assert images.shape == (3, 784)
    assert 0 <= images.min() <= images.max() <= 1
    assert verdicts.shape == (3, 1)
    assert 0 < verdicts.min() <= verdicts.max() < 1


def test_with_that_readmes_eps_the_noise_fades(example: Any) -> None:
    deviations = {}
    for eps in (example.EPS, 1e-5):
        torch.manual_seed(0)
        generator, noise = example.generator_of(100, eps), torch.randn(512, 100)
        with torch.no_grad():
            deviations[eps] = generator(noise).std(0).mean().item()
    assert 20 < deviations[1e-5] / deviations[example.EPS] < 30  # what the page says


def test_the_arms_have_the_learning_rates_they_are_named_by(example: Any) -> None:
    given = {"preset": "small", "optimizers": list(example.OPTIMIZERS), "steps": [0, 5]}
    configs = example.build({**given, "seed": 3, "seeds": 2})
    assert [c.seed for c in configs] == [3] * 12 + [4] * 12
    rates = {c.optimizer: (c.lr, c.momentum) for c in configs}
    assert rates["Adam"] == rates["SGD"] == (2e-4, 0)
    assert rates["SGD-fast"] == (0.02, 0)
    assert rates["momentum"] == rates["momentum-eps"] == (0.002, 0.9)
    eps = {c.optimizer: c.batch_norm_eps for c in configs}
    assert eps.pop("SGD-fast-eps") == eps.pop("momentum-eps") == 1e-5
    assert set(eps.values()) == {0.8}
    paper = example.build({**given, "preset": "paper", "seed": 0, "seeds": 1})
    assert {c.pairs for c in paper} == {187_400}


@pytest.mark.parametrize("optimizer", ["Adam", "momentum"])
def test_it_resumes_to_the_same_numbers(example: Any, optimizer: str, tmp_path: Path) -> None:
    arm = {"optimizer": optimizer, "unroll_steps": 1, "momentum": 0.9}
    once = trained(example, tmp_path / "a", 4, **arm)
    again = trained(example, tmp_path / "b", 3, 4, **arm)
    for content in (once, again):
        for row in content["log"]["history"]:
            del row["seconds"], row["seconds_a_pair"]
    assert str(once["log"]["history"]) == str(again["log"]["history"])  # of NaNs too
    assert torch.equal(once["rng"], again["rng"])
    for part in "gd":
        for key, value in once["parts"][part].items():
            assert torch.equal(value, again["parts"][part][key]), key


def test_what_is_measured_of_d_is_what_sgd_does(example: Any, tmp_path: Path) -> None:
    content = trained(example, tmp_path, 4, optimizer="SGD", lr=0.05)
    for row in content["log"]["history"][1:]:
        assert row["d_update"] == pytest.approx(0.05 * row["d_gradient"], rel=1e-3)
        assert row["d_loss"] > row["g_loss"]  # near the start: 2 ln 2 and ln 2, not swapped
        assert 0 < row["d_on_pattern"] < 1


def test_a_generator_of_one_image_has_no_variance_and_one_class(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = example.generator_of

    def collapsed(noise_size: int, eps: float) -> nn.Sequential:
        generator: nn.Sequential = whole(noise_size, eps)
        last = generator[-2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        return generator

    monkeypatch.setattr(example, "generator_of", collapsed)
    first = trained(example, tmp_path, 2)["log"]["history"][0]
    assert first["variance"] == pytest.approx(0, abs=1e-6)
    assert first["classes"] == first["classes_of_a_percent"] == 1
    assert first["class_entropy"] == 0
    assert first["d_on_pattern"] == pytest.approx(first["d_on_fake"], abs=1e-5)


def test_the_command_line_records_draws_generates_and_overwrites_nothing(
    example: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> None:
        out = ["--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["gan_mnist.py", *arguments, *out])
        example.main()

    def refusal(*arguments: str) -> str:
        with pytest.raises(SystemExit) as refused:
            run(*arguments)
        assert refused.value.code == 2
        return capsys.readouterr().err

    record = tmp_path / "record.csv"
    train = ["--optimizers", "Adam", "SGD", "--unroll-steps", "1", "--iterations", "2"]
    train += ["--samples", "30", "--evaluate-every", "1", "--workers", "1", "--record", str(record)]
    run(*train)
    with record.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"] for row in rows] == ["Adam", "SGD"]
    assert float(rows[0]["images_a_second"]) > 0
    assert 0 <= float(rows[0]["taken_for_real"]) <= 1
    for name in ("samples", "losses", "sampling", "explanation"):
        assert (tmp_path / "out" / f"gan_mnist_{name}.png").stat().st_size > 0

    checkpoint = tmp_path / "out" / "checkpoints" / "Adam-K1-seed0.pt"
    run("--generate", str(checkpoint))
    written = tmp_path / "out" / "generated" / "Adam-K1-seed0"
    assert len(list(written.glob("*.png"))) == 50
    assert "--out must not hold these samples already" in refusal("--generate", str(checkpoint))
    assert "--generate must be a checkpoint" in refusal("--generate", str(record))
    assert "--out must not hold the run already" in refusal(*train)
    assert "lr 0.0002, not 0.1" in refusal(*train, "--resume", "--lr", "0.1")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--unroll-steps", "-1"),
        ("--iterations", "0"),
        ("--lr", "0.0"),
        ("--optimizers", "LBFGS"),
        ("--generate", "no.pt"),
    ],
)
def test_it_refuses_bad_arguments_before_any_work(
    example: Any,
    arguments: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gan_mnist.py", *arguments, "--out", str(out)])
    with pytest.raises(SystemExit) as refused:
        example.main()
    assert refused.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(part in error for part in arguments)
    assert not out.exists()


def test_a_missing_classifier_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    example: Any,
) -> None:
    monkeypatch.undo()
    monkeypatch.syspath_prepend(EXAMPLES)
    digits = importlib.import_module("lab.data.digits")
    monkeypatch.setattr(digits, "mnist", lambda *_, **__: None)
    command = ["gan_mnist.py", "--classifier", str(tmp_path / "none.pt"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        example.main()
    assert "--classifier must be a trained classifier" in capsys.readouterr().err
