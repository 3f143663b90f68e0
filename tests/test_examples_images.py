"""The experiments on images: their networks, resuming, commands, records and refusals."""

import math
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import softplus

import unroll
from tests import tiny_mnist
from tests.examples import ROOT, command, example, refused, rows, same, trained
from tests.test_compile import as_it_is
from unroll._modes import backend

MNIST = ("stacked_mnist", "colored_mnist", "rnn_mnist", "gan_mnist")
FEW = {"samples": 40, "batch_size": 4, "evaluate_every": 2}
ARMS: list[tuple[str, dict[str, Any]]] = [
    ("stacked_mnist", {**FEW, "seeds": 2, "compile": False, "curve_samples": 40,
                       "unroll_steps": 1}),
    ("colored_mnist", {**FEW, "seeds": 2, "compile": False, "size": "1/4", "unroll_steps": 1}),
    ("rnn_mnist", {**FEW, "seeds": 2, "compile": False, "width": 8, "noise_size": 4,
                   "unroll_steps": 1}),
    ("gan_mnist", {**FEW, "optimizer": "momentum", "learning_rate": 0.01, "momentum": 0.9,
                   "unroll_steps": 1}),
    ("cifar10", {"size": 1 / 32, "batch_size": 4, "noise_size": 6, "evaluate_every": 2,
                 "unroll_steps": 1, "data": "images", "images": 6}),
    ("cifar10", {"size": 1 / 32, "batch_size": 4, "noise_size": 6, "evaluate_every": 2, "ema": 0.9,
                 "unroll_steps": 1, "amp": True, "channels_last": True, "checkpointed": True}),
    ("rsgan", {"game": "Rp", "ema": 0.9, "unroll_steps": 1, "batch_size": 2, "samples": 4}),
]  # fmt: skip


@pytest.fixture(name="files")
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Path]]:
    """Make digits, images and an untrained classifier."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(256, (32, 32, 3), generator=rng, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / split / f"{number}.png")
    root, file = tiny_mnist.write(tmp_path / "data"), tmp_path / "classifier.pt"
    classifier = example("lab.metrics.classifier")
    facts = {"widths": list(classifier.WIDTHS), "test_accuracy": 10.0}
    classifier.save(file, classifier.network(), facts)

    def of(name: str) -> dict[str, Path]:
        if name not in MNIST:
            return {"data_root": tmp_path / "images"}
        judged = {} if name == "colored_mnist" else {"classifier": file}
        return {"data_root": root, **judged}

    return of


def flags(files: dict[str, Path]) -> list[object]:
    return [p for name, path in files.items() for p in (f"--{name.replace('_', '-')}", path)]


def options(name: str, files: dict[str, Path]) -> Any:
    return replace(example(name).HOOKS["options"], **files)


@pytest.mark.parametrize(("name", "settings"), ARMS)
def test_a_run_resumes_to_the_same_numbers(
    name: str,
    settings: dict[str, Any],
    files: Callable[[str], dict[str, Path]],
    tmp_path: Path,
) -> None:
    own = options(name, files(name))
    once = trained(name, tmp_path / "once", 4, options=own, **settings)
    again = trained(name, tmp_path / "again", 3, 4, options=own, **settings)
    if name == "stacked_mnist":  # the end of the shorter run was its last evaluation
        for content in (once, again):
            for row in content["log"]["history"][:-1]:
                for each in row["each"]:
                    del each["modes"], each["reverse_kl"]
    same(once, again)


def test_a_compiled_run_resumes_to_the_same_numbers(
    files: Callable[[str], dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(True)
        return as_it_is(*arguments, **options)

    def smaller(rng: torch.Generator) -> nn.Sequential:
        """Return a D with layers of all kinds of rnn_mnist's, which are traced in less time."""
        normalised = nn.Conv2d(1, 2, 3, stride=4), nn.BatchNorm2d(2), nn.LeakyReLU(0.3)
        network = nn.Sequential(*normalised, nn.Flatten(), nn.Linear(2 * 7 * 7, 1))
        example("rnn_mnist").xavier(network, rng)
        return network

    monkeypatch.setattr(example("rnn_mnist"), "discriminator", smaller)
    monkeypatch.setattr(backend, "generated", counted)  # traced and rounded as compiled code is
    own, settings = options("rnn_mnist", files("rnn_mnist")), dict(ARMS)["rnn_mnist"]
    settings = {**settings, "compile": True, "unroll_steps": 2, "learning_rate": 0.01}
    once = trained("rnn_mnist", tmp_path / "once", 4, options=own, **settings)
    assert calls
    again = trained("rnn_mnist", tmp_path / "again", 2, 4, options=own, **settings)
    same(once, again)


def alone(name: str, config: Any, seed: int, data: Any) -> tuple[nn.Module, nn.Module]:
    """Train one seed as ordinary networks, and return them."""
    module, study = example(name), example("lab.study")
    rng = torch.Generator().manual_seed(seed)
    g, d = module.networks(config, rng)
    g_optimizer, d_optimizer = (
        torch.optim.Adam(
            network.parameters(),
            getattr(config, f"{player}_learning_rate", None) or config.learning_rate,
            (config.beta1, 0.999),
        )
        for player, network in (("generator", g), ("discriminator", d))
    )
    game = unroll.NonSaturating()
    unrolled = unroll.UnrolledGeneratorLoss(d, d_optimizer, game, unroll_steps=config.unroll_steps)
    if name == "rnn_mnist":  # its weights have a generator of their own
        rng.manual_seed(seed)

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, config.noise_size, generator=rng)

    def real(count: int = config.batch_size) -> Tensor:
        if name == "colored_mnist":
            found: Tensor = module.batch(data, count, rng)
        else:
            found = (data.stacks if name == "stacked_mnist" else data.sample)(count, rng)
        return found

    noise(config.samples)
    if name == "colored_mnist":  # what the metrics are compared with
        real(config.samples)
        real(config.samples)
    order = {  # the batches of D's step and of G's, as drawn
        "stacked_mnist": (noise, real, noise, real),
        "colored_mnist": (real, real, noise, noise),
        "rnn_mnist": (real, noise, noise, real),
    }[name]
    for _ in range(config.pairs):
        drawn = [(draw is noise, draw()) for draw in order]
        (z, z_of_g), (x, x_of_g) = (
            [batch for is_noise, batch in drawn if is_noise is wanted] for wanted in (True, False)
        )
        study.step(d_optimizer, game.discriminator_loss(d, g(z).detach(), x))
        study.step(g_optimizer, unrolled(g(z_of_g), x_of_g))
    return g, d


@pytest.mark.parametrize("name", ["stacked_mnist", "colored_mnist", "rnn_mnist"])
def test_seeds_side_by_side_are_as_each_alone(
    name: str,
    files: Callable[[str], dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = options(name, files(name))
    digits, joined = example("lab.data.digits"), example("lab.networks.joined")
    monkeypatch.setattr(digits, "as_floats", lambda images: images.double() / 127.5 - 1)
    settings = {**dict(ARMS)[name], "unroll_steps": 3, "batch_size": 6}
    torch.set_default_dtype(torch.float64)
    try:
        found = trained(name, tmp_path, 3, options=own, first_seed=1, **settings)
        config = replace(example(name).PRESETS["small"], **settings, pairs=3)
        data = digits.mnist(own.data_root, size=32 if name == "colored_mnist" else 28)
        each = iter([alone(name, config, seed, data) for seed in (1, 2)])
    finally:
        torch.set_default_dtype(torch.float32)
    players = joined.players(example("lab.seeds").Generators((1, 2), "cpu"), lambda _: next(each))
    for part, network in zip("gd", players, strict=True):
        for key, value in network.state_dict().items():
            # Biases before BatchNorm have gradients of round-off alone, which Adam scales up.
            atol = 1e-7 if key.endswith("product.bias") else 1e-9
            torch.testing.assert_close(found["parts"][part][key], value, rtol=1e-7, atol=atol)


def test_a_run_that_is_killed_between_evaluations_resumes_to_the_same_numbers(
    files: Callable[[str], dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, settings = ARMS[2]
    own = options("rnn_mnist", files("rnn_mnist"))
    once = trained("rnn_mnist", tmp_path / "once", 5, options=own, **settings)
    runs, digits = example("lab.runs"), example("lab.data.digits").Digits
    monkeypatch.setattr(runs, "SECONDS_AT_RISK", -1)
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    sample, drawn = digits.sample, 0

    def killed(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 15:  # two batches a pair and seed: in the fourth
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(digits, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        trained("rnn_mnist", tmp_path / "again", 5, options=own, **settings)
    (path,) = (tmp_path / "again" / "checkpoints").glob("*.pt")
    assert torch.load(path, weights_only=True)["log"]["since"][0] == 3
    config = replace(example("rnn_mnist").PRESETS["small"], **settings, pairs=5)
    example("rnn_mnist").train(config, replace(own, out=tmp_path / "again", resume=True), 0)
    content = torch.load(path, weights_only=True)
    for row in content["log"]["history"]:
        del row["seconds"]
        for each in row["each"]:
            del each["cpu_seconds"]
    same(once, content)


DIVERSE = ("--pairs", 2, "--samples", 40, "--batch-size", 4, "--evaluate-every", 1)
COMMANDS: list[tuple[str, Sequence[object], list[tuple[str, ...]], list[str]]] = [
    (
        "stacked_mnist",
        (*DIVERSE, "--unroll-steps", 0),
        [(size, "0", pairs) for size in ("0.25", "0.5") for pairs in "12"],
        ["stacked_mnist_small_E.png", "stacked_mnist_small_E_curves.png"],
    ),
    (
        "colored_mnist",
        (*DIVERSE, "--unroll-steps", 0, "--size", "1/4", "1/2"),
        [("1/4", "0", "2"), ("1/2", "0", "2")],
        ["colored_mnist_samples.png", "colored_mnist_js.png"],
    ),
    (
        "rnn_mnist",
        (*DIVERSE, "--unroll-steps", 0, 1, "--standard-pairs", 3, "--record-every", 2,
         "--width", 8, "--no-compile"),
        [("8", "0", "2"), ("8", "0", "3"), ("8", "1", "2")],
        ["rnn_mnist.png", "rnn_mnist_curves.png"],
    ),
    (
        "gan_mnist",
        (*DIVERSE, "--unroll-steps", 0, "--optimizer", "Adam", "SGD-fast-eps"),
        [("Adam", "0.0002", "0.8"), ("SGD-fast-eps", "0.02", "1e-05")],
        ["gan_mnist_samples.png", "gan_mnist_samples_curves.png"],
    ),
    (
        "rsgan",
        ("--pairs", 1, "--samples", 6, "--batch-size", 2, "--evaluate-every", 1,
         "--unroll-steps", 0),
        [("JS", "0", "1"), ("Rp", "0", "1")],
        ["rsgan_small.png", "rsgan_small_curves.png"],
    ),
]  # fmt: skip
VARIED = {
    "stacked_mnist": ("size", "unroll_steps", "pairs"),
    "colored_mnist": ("size", "unroll_steps", "pairs"),
    "rnn_mnist": ("width", "unroll_steps", "pairs"),
    "gan_mnist": ("optimizer", "lr", "batch_norm_eps"),
    "rsgan": ("game", "unroll_steps", "pairs"),
}
NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
"""


@pytest.mark.parametrize(("name", "arguments", "expected", "figures"), COMMANDS)
def test_a_command_records_draws_and_overwrites_nothing(
    name: str,
    arguments: Sequence[object],
    expected: list[tuple[str, ...]],
    figures: list[str],
    files: Callable[[str], dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(example("lab.metrics.image_metrics"), "CLUSTERINGS", 1)
    given = [*arguments, *flags(files(name)), "--record"]
    if name == "rsgan":
        (tmp_path / "network.py").write_text(NETWORK)
        given += ["--features", f"{tmp_path / 'network.py'}:build"]
    out = Path(command(name, tmp_path, *given))
    found = rows(tmp_path / f"{name}.csv")
    assert sorted(tuple(row[c] for c in VARIED[name]) for row in found) == sorted(expected)
    kept = (ROOT / "docs" / "results" / f"{name}.csv").read_text().partition("\n")[0]
    head = (tmp_path / f"{name}.csv").read_text().partition("\n")[0]
    assert set(kept.split(",")) == set(head.split(","))  # rows of both are of one kind
    for figure in figures:
        assert (out / figure).stat().st_size > 0
    assert "Preset small: " in capsys.readouterr().out
    for more, message in (
        ((), "--out must not hold the run already"),
        (("--resume", "--beta1", "0.4"), "beta1 0.5, not 0.4"),
    ):
        with pytest.raises(SystemExit):
            command(name, tmp_path, *given, *more)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("stacked_mnist", ("--unroll-steps", -1), "--unroll-steps must not be negative, got -1"),
        ("stacked_mnist", ("--size", 0.3), "--size must be a multiple of 1/8, got 0.3"),
        ("stacked_mnist", ("--data-root", "nowhere"), "must be a folder with MNIST/raw"),
        ("stacked_mnist", ("--classifier", "no.pt"), "--classifier must be a trained classifier"),
        ("colored_mnist", ("--samples", 3), "--samples must be at least 10, got 3"),
        ("colored_mnist", ("--size", 2), "--size"),
        ("rnn_mnist", ("--learning-rate", -1), "--learning-rate must be positive, got -1"),
        ("rnn_mnist", ("--records", "file", "--record"), "--records must be in a folder that can"),
        ("gan_mnist", ("--optimizer", "LBFGS"), "--optimizer"),
        ("gan_mnist", ("--generate", "no.pt"), "--generate must be a checkpoint of gan_mnist.py"),
        ("cifar10", ("--data-root", "nowhere"), "nowhere is no folder: give another"),
        ("cifar10", ("--ema", 1), "--ema must be at least 0 and below 1, got 1.0"),
        ("cifar10", ("--batch-size", 1), "--batch-size must be at least 2"),
        ("rsgan", ("--image-size", 40), "--image-size must be one of [32, 48] for dcgan, got 40"),
        ("rsgan", ("--width", "bottleneck"), "--width bottleneck is of the ResNets"),
        ("rsgan", ("--features", "absent.pt"), "absent.pt, which does not exist"),
        ("rsgan", ("--record",), "--record needs --features"),
        ("rsgan", ("--preset", "stl10"), "STL-10 is neither whole in"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    name: str,
    arguments: tuple[object, ...],
    message: str,
    files: Callable[[str], dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.STL10.__init__", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    own = files(name) if "--preset" not in arguments else {}
    given = [*flags(own), *arguments]
    if "--records" in arguments:
        with pytest.raises(SystemExit):
            example(name).main(arguments=[*map(str, given), "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
        return
    assert message in refused(name, tmp_path, capsys, *given)


def test_real_stacks_are_scored(
    files: Callable[[str], dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--data-score", "--seeds", 2, "--samples", 50, "--record")
    with pytest.raises(SystemExit):
        command("stacked_mnist", tmp_path, *flags(files("stacked_mnist")), *given)
    assert "seed 1: " in capsys.readouterr().out
    found = rows(tmp_path / "stacked_mnist_data.csv")
    assert [(row["seed"], row["test_accuracy"]) for row in found] == [("0", "10.0"), ("1", "10.0")]


def test_runs_at_two_learning_rates_are_both_recorded(
    files: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    given = (*DIVERSE, "--unroll-steps", 0, "--optimizer", "SGD", "--record", "--force")
    for rate in (0.1, 0.2, 0.2):
        own = *flags(files("gan_mnist")), "--learning-rate", rate
        command("gan_mnist", tmp_path, *given, *own)
    assert [row["lr"] for row in rows(tmp_path / "gan_mnist.csv")] == ["0.1", "0.2"]


def test_samples_of_a_finished_run_are_written_once(
    files: Callable[[str], dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = options("gan_mnist", files("gan_mnist"))
    trained("gan_mnist", tmp_path / "run", 1, options=own, **ARMS[3][1])
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    with pytest.raises(SystemExit):
        command("gan_mnist", tmp_path, "--generate", path)
    written = tmp_path / "out" / "generated" / path.stem
    assert len(list(written.glob("*.png"))) == 50
    with pytest.raises(SystemExit):
        command("gan_mnist", tmp_path, "--generate", path)
    assert "--out must not hold these samples already" in capsys.readouterr().err


def test_throughput_times_pairs_and_their_data_by_turns(
    files: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    given = ("--experiment", "stacked_mnist", "--preset", "small", "--pairs", 2, "--record",
             "--unroll-steps", 0, "--seeds", 2, "--batch-size", 4, "--against", ROOT)  # fmt: skip
    own = (*given, *flags(files("stacked_mnist")), "--records", tmp_path)
    example("throughput").main([*map(str, own)])
    lines = (tmp_path / "throughput.csv").read_text().splitlines()
    assert len(lines) == 2  # of one revision
    row = dict(zip(*(line.split(",") for line in lines), strict=True))
    pair, data = float(row["seconds_a_pair"]), float(row["data_seconds_a_pair"])
    assert 0 < data < pair
    assert float(row["images_a_second"]) == pytest.approx(4 / pair)
    assert (row["pairs"], row["batch_size"]) == ("2", "4")


def test_cifar10_is_recorded_and_measured(
    files: Callable[[str], dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = files("cifar10")["data_root"]
    small = ("--size", 1 / 32, "--batch-size", 4, "--pairs", 2, "--unroll-steps", 0, 1)
    out = Path(command("cifar10", tmp_path, *small, "--data-root", root, "--record"))
    found = [(r["unroll_steps"], r["data"], r["images"]) for r in rows(tmp_path / "cifar10.csv")]
    assert sorted(found) == [("0", "images", "6"), ("1", "images", "6")]
    assert (out / "cifar10_samples.png").stat().st_size > 0

    diversity = example("cifar10_diversity")
    given: list[Any] = ["--checkpoints", out / "checkpoints", "--out", tmp_path / "measured"]
    given += ["--targets", 3, "--starts", 2, "--steps", 3, "--samples", 6, "--distances", 20]
    given += ["--data-root", root, "--record", "--records", tmp_path]
    for _ in range(2):  # the second time from what is kept
        diversity.main([*map(str, given)])
    inverted = rows(tmp_path / "cifar10_inversion.csv")
    assert len({(r["unroll_steps"], r["image"]) for r in inverted}) == len(inverted) == 6
    measured = rows(tmp_path / "cifar10_distances.csv")
    assert [row["unroll_steps"] for row in measured] == ["0", "1"]
    for name in ("inversion", "distances"):
        kept = (ROOT / "docs" / "results" / f"cifar10_{name}.csv").read_text().partition("\n")[0]
        head = (tmp_path / f"cifar10_{name}.csv").read_text().partition("\n")[0]
        assert set(head.split(",")) == set(kept.split(","))
    for name in ("cifar10_reconstructions_seed0", "cifar10_distances"):
        assert (tmp_path / "measured" / f"{name}.png").stat().st_size > 0

    make = example("cifar10").sampler(out / "checkpoints" / "K0-seed0.pt")
    drawn = make(3, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.uint8 and drawn.shape == (3, 3, 32, 32)

    def stopped(*more: object) -> str:
        with pytest.raises(SystemExit):
            diversity.main([*map(str, (*given, *more))])
        return str(capsys.readouterr().err)

    assert "K0-seed0.pt cannot be resumed, it has starts 2, not 1" in stopped("--starts", 1)
    assert "--targets must be at most 6, got 9" in stopped("--targets", 9)
    assert "--checkpoints must be a folder of cifar10.py's" in stopped("--checkpoints", tmp_path)
    path = out / "checkpoints" / "K1-seed0.pt"
    content = torch.load(path, weights_only=True)
    content["settings"]["pairs"] = 5
    torch.save(content, path)
    assert "must be finished, it is at pair 2 of 5: continue it" in stopped()
    (root / "train" / "5.png").unlink()
    content["settings"]["pairs"] = 2
    torch.save(content, path)
    assert "--data-root must be what" in stopped()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_last_checkpoint_whole(
    failure: BaseException,
    files: Callable[[str], dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = ["--size", 1 / 32, "--batch-size", 4, "--unroll-steps", 0, *flags(files("cifar10"))]
    out = Path(command("cifar10", tmp_path, *small, "--pairs", 2))
    (path,) = (out / "checkpoints").iterdir()
    before = path.read_bytes()

    def half(draft: Path, content: Any) -> None:
        with draft.open("wb") as file:
            file.write(content[:100])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(SystemExit) as stopped:
        command("cifar10", tmp_path, *small, "--pairs", 4, "--resume")
    said = str(stopped.value.code)
    assert "--resume continues" in said
    assert isinstance(failure, KeyboardInterrupt) or "No space left on device" in said
    assert [*(out / "checkpoints").iterdir()] == [path]
    assert path.read_bytes() == before


def test_training_stops_at_numbers_that_are_not_finite(
    files: Callable[[str], dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rsgan, own = example("rsgan"), options("rsgan", files("rsgan"))
    settings = {**ARMS[6][1], "game": "JS", "unroll_steps": 0, "ema": 0.0, "evaluate_every": 1}
    trained("rsgan", tmp_path, 2, options=own, **settings)
    broken = SimpleNamespace(
        generator_loss=rsgan.GAMES["JS"].generator_loss,
        discriminator_loss=lambda discriminator, fake, _: discriminator(fake).sum() * math.nan,
    )
    monkeypatch.setitem(rsgan.GAMES, "JS", broken)
    config = replace(rsgan.PRESETS["small"], **settings, pairs=4)
    with pytest.raises(FloatingPointError, match=r"D at pair 3 of JS, K = 0, seed 0: .*of pair 2"):
        rsgan.train(config, replace(own, out=tmp_path, resume=True), 0)
    (path,) = (tmp_path / "checkpoints").iterdir()
    kept = torch.load(path, weights_only=True)
    assert [row["pairs"] for row in kept["log"]["history"]] == [0, 1, 2]
    assert all(value.isfinite().all() for value in kept["parts"]["d"].values())


def test_training_stops_at_a_step_that_overflows(
    files: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    settings = {**ARMS[4][1], "unroll_steps": 0, "discriminator_learning_rate": 1e38}
    own = options("cifar10", files("cifar10"))
    with pytest.raises(FloatingPointError, match=r"D at pair 1 .* step must leave the parameters"):
        trained("cifar10", tmp_path, 1, options=own, **settings)
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def _rank(rank: int, world: int, folder: str) -> None:
    """Train as a process of torchrun, without BatchNorm, whose statistics are a rank's own."""
    sys.path.insert(0, str(ROOT / "examples"))
    cifar10 = example("cifar10")
    cifar10.dcgan._normalised = lambda _: [nn.LeakyReLU(0.3)]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": (Path(folder) / "port").read_text()}
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world), **address}
    cifar10.ranks.join("cpu")
    config = replace(cifar10.PRESETS["small"], **ARMS[4][1], ranks=world, pairs=4)
    where = {"data_root": Path(folder, "images"), "out": Path(folder, "out2")}
    cifar10.train(config, replace(cifar10.HOOKS["options"], **where), 0)
    cifar10.ranks.leave()


def test_two_ranks_train_as_one_process_does(
    files: Callable[[str], dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = options("cifar10", files("cifar10"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    spawn(_rank, (2, str(tmp_path)), nprocs=2)
    monkeypatch.setattr(example("cifar10").dcgan, "_normalised", lambda _: [nn.LeakyReLU(0.3)])
    one = trained("cifar10", tmp_path / "out1", 4, options=own, **ARMS[4][1])
    (path,) = (tmp_path / "out2" / "checkpoints").iterdir()
    two = torch.load(path, weights_only=True)
    for part in "gd":
        for key, tensor in one["parts"][part].items():
            assert (tensor - two["parts"][part][key]).abs().max() < 1e-5, key


def test_the_networks_of_stacked_mnist_are_those_of_appendix_e() -> None:
    stacked_mnist, rng = example("stacked_mnist"), torch.Generator().manual_seed(0)
    for x, size, widths in ((0.25, 28, (2, 4, 8)), (0.5, 32, (4, 8, 16))):
        config = replace(stacked_mnist.PRESETS["paper"], size=x, image_size=size)
        g, d = stacked_mnist.networks(config, rng)
        images = g(torch.randn(2, 256))
        assert images.shape == (2, 3, size, size)
        assert images.abs().max() <= 1
        assert d(images).shape == (2, 1)
        assert [p.shape[0] for p in d.parameters() if p.ndim == 4] == list(widths)
        assert [p.shape[0] for p in g.parameters() if p.ndim == 4] == [64, 32, 16, 8]
    config = replace(stacked_mnist.PRESETS["paper"], networks="D", size=1.0)
    _, d = stacked_mnist.networks(config, rng)
    assert [p.shape[0] for p in d.parameters() if p.ndim == 4] == [64, 128, 256]


def test_the_networks_of_cifar10_are_those_of_appendix_d() -> None:
    dcgan, rng = example("lab.networks.dcgan"), torch.Generator()
    g, d = dcgan.generator(1, rng), dcgan.discriminator(1, rng)
    assert d(g(torch.randn(2, 256))).shape == (2, 1)
    shapes = [tuple(p.shape) for p in g.parameters() if p.ndim > 1]
    assert shapes == [(8192, 256), (512, 256, 3, 3), (256, 128, 3, 3), (128, 64, 3, 3),
                      (64, 3, 3, 3)]  # fmt: skip
    shapes = [tuple(p.shape) for p in d.parameters() if p.ndim > 1]
    assert shapes == [(64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (1, 4096)]
    assert [m.negative_slope for m in (*g, *d) if isinstance(m, nn.LeakyReLU)] == [0.3] * 7
    with pytest.raises(ValueError, match="--size must leave every layer a channel"):
        dcgan.generator(1 / 1000, rng)


def test_the_lstm_starts_from_the_noise_and_emits_columns() -> None:
    lstm, z = example("rnn_mnist"), torch.randn(3, 6)
    generator = lstm.Generator(6, 5, "both", torch.Generator().manual_seed(0))
    cell = nn.LSTMCell(1, 5)
    cell.load_state_dict(
        {name.removesuffix("_l0"): value for name, value in generator.lstm.state_dict().items()}
    )
    hidden = memory = torch.relu(z @ generator.first.weight.T + generator.first.bias)
    columns = []
    for _ in range(28):
        hidden, memory = cell(torch.zeros(3, 1), (hidden, memory))
        columns.append(torch.tanh(generator.last(hidden)))
    torch.testing.assert_close(generator(z)[:, 0], torch.stack(columns, dim=2))  # columns, not rows
    for state in ("hidden", "cell"):
        generator = lstm.Generator(6, 5, state, torch.Generator().manual_seed(0))
        noise = generator.first(z).relu()[None]
        states = [noise if n == state else torch.zeros_like(noise) for n in ("hidden", "cell")]
        drawn, _ = generator.lstm(torch.zeros(3, 28, 1), tuple(states))
        torch.testing.assert_close(generator(z)[:, 0], generator.last(drawn).tanh().mT)


def test_the_networks_of_rnn_mnist_are_those_of_appendix_c() -> None:
    lstm = example("rnn_mnist")
    config = lstm.PRESETS["paper"]
    size = config.noise_size, config.width, config.initial_state
    generator = lstm.Generator(*size, torch.Generator().manual_seed(0))
    biases = generator.lstm.bias_ih_l0 + generator.lstm.bias_hh_l0
    _, forget, *_ = biases.detach().view(4, 256)  # gates i, f, g, o
    assert forget.unique().tolist() == [1.0]
    assert biases.sum().item() == 256
    bound = (6 / (256 + 4 * 256)) ** 0.5  # Glorot's, uniform
    assert 0.99 * bound < generator.lstm.weight_hh_l0.abs().max().item() <= bound
    d = lstm.discriminator(torch.Generator().manual_seed(0))
    kinds = [type(layer) for layer in d]
    assert kinds == [*[nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU] * 3, nn.Flatten, nn.Linear]
    widths = [(d[i].out_channels, d[i].stride) for i in (0, 3, 6)]
    assert widths == [(16, (2, 2)), (32, (2, 2)), (32, (2, 2))]


def test_the_networks_of_gan_mnist_are_that_readmes_whose_noise_fades() -> None:
    gan_mnist = example("gan_mnist")
    deviations = {}
    for eps in (gan_mnist.EPS, 1e-5):
        torch.manual_seed(0)
        generator, noise = gan_mnist.generator_of(100, eps), torch.randn(512, 100)
        with torch.no_grad():
            images = generator(noise)
        deviations[eps] = images.std(0).mean().item()
        assert 0 <= images.min() <= images.max() <= 1
    assert 20 < deviations[1e-5] / deviations[gan_mnist.EPS] < 30
    widths = [m.out_features for m in generator if isinstance(m, nn.Linear)]
    assert widths == [128, 256, 512, 1024, 784]
    discriminator = gan_mnist.discriminator_of()
    assert [m.out_features for m in discriminator if isinstance(m, nn.Linear)] == [512, 256, 1]
    assert isinstance(discriminator[-1], nn.Sigmoid)


def test_what_is_measured_of_d_is_what_sgd_does(
    files: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    settings = {**FEW, "optimizer": "SGD", "learning_rate": 0.05}
    own = options("gan_mnist", files("gan_mnist"))
    content = trained("gan_mnist", tmp_path, 4, options=own, **settings)
    for row in content["log"]["history"][1:]:
        assert row["d_update"] == pytest.approx(0.05 * row["d_gradient"], rel=1e-3)
        assert row["d_loss"] > row["g_loss"]  # near the start: 2 ln 2 and ln 2, not swapped
        assert 0 < row["d_on_pattern"] < 1


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("structure", ["dcgan", "resnet"])
def test_the_networks_of_rsgan_make_and_judge_images(structure: str, size: int) -> None:
    resnets = example("lab.networks.resnets")
    torch.manual_seed(0)
    generator, discriminator = resnets.networks(structure, size, "quarter")
    images = generator(torch.randn(2, resnets.NOISE))
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2, 1)
    assert discriminator[-1].weight.norm().item() == pytest.approx(1, abs=1e-4)


def test_the_widths_of_rsgan_are_those_of_the_authors_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resnets = example("lab.networks.resnets")
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight: weight)  # slow where wide

    def channels(structure: str, size: int, width: str) -> tuple[list[int], list[int]]:
        kinds = torch.nn.Conv2d, torch.nn.ConvTranspose2d
        g, d = (
            [layer.out_channels for layer in net.modules() if isinstance(layer, kinds)]
            for net in resnets.networks(structure, size, width)
        )
        return g, d

    full = [256, 128, 64, 3], [64, 64, 128, 128, 256, 256, 512]
    assert channels("dcgan", 32, "regular") == full
    for width, divisor in (("half", 2), ("quarter", 4)):
        g, d = channels("dcgan", 32, width)
        assert g == [n // divisor for n in full[0][:-1]] + [3]
        assert d == [n // divisor for n in full[1]]
    assert channels("resnet", 32, "regular") == ([256] * 9 + [3], [128] * 12)
    assert set(channels("resnet", 32, "bottleneck")[1]) == {64, 128}
    assert max(channels("resnet", 48, "half")[1]) == 512


def test_the_games_and_rates_of_rsgan_are_the_authors() -> None:
    rsgan = example("rsgan")
    fake, real = torch.randn(2, 8, 1, dtype=torch.float64)

    def itself(x: Tensor) -> Tensor:
        return x

    js, rp = rsgan.GAMES["JS"], rsgan.GAMES["Rp"]
    expected = {
        js.discriminator_loss: softplus(-real).mean() + softplus(fake).mean(),
        js.generator_loss: softplus(-fake).mean(),
        rp.discriminator_loss: softplus(fake - real).mean(),
        rp.generator_loss: softplus(real - fake).mean(),
    }
    for loss, value in expected.items():
        assert torch.allclose(loss(itself, fake, real), value)
    config = rsgan.PRESETS["cifar-resnet"]
    rates = [config.rate(pair) for pair in (1, 50_000, 75_000, 100_000, 200_000)]
    assert rates == [1, 1, 0.5, 0, 0]


def test_a_longer_run_of_rsgan_decays_until_its_end_and_knows_its_data(
    files: Callable[[str], dict[str, Path]],
) -> None:
    rsgan = example("rsgan")
    root = files("rsgan")["data_root"]
    longer = replace(rsgan.PRESETS["small"], pairs=200_000)
    (config,) = rsgan.arms([longer], rsgan.Options(data_root=root))
    assert config.rate(150_000) == pytest.approx(1 / 3)
    assert "none apart" not in config.data
    (config,) = rsgan.arms([rsgan.PRESETS["small"]], rsgan.Options(data_root=root / "train"))
    assert config.data.endswith("images, none apart for the metrics")


def test_the_sampler_draws_from_the_averaged_generator_where_there_is_one(
    files: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    rsgan = example("rsgan")
    settings = {**ARMS[6][1], "unroll_steps": 0, "ema": 0.5}
    own = options("rsgan", files("rsgan"))
    content = trained("rsgan", tmp_path, 3, options=own, **settings)
    config = rsgan.Config(**content["settings"])
    assert asdict(config)["ema"] == 0.5
    make = rsgan.sampler(config.checkpoint(tmp_path))
    images = make(4, torch.Generator().manual_seed(1))
    assert torch.equal(images, make(4, torch.Generator().manual_seed(1)))
    generator = example("lab.networks.resnets").networks("dcgan", 32, "quarter")[0]
    generator.load_state_dict(content["parts"]["g"])
    noise = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    as_bytes = example("lab.data.pixels").as_bytes
    assert not torch.equal(images, as_bytes(rsgan.sample(generator, noise)))
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    rsgan.sample(generator, noise)
    assert all(torch.equal(v, before[name]) for name, v in generator.state_dict().items())
    assert re.fullmatch(r"small-dcgan-quarter-Rp-K0-seed0", config.name)
