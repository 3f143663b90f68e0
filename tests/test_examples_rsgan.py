"""RS-GAN on images: its networks, its games, resuming, and what is refused."""

import importlib
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import softplus

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHORT = {"batch_size": 2, "samples": 4, "evaluate_every": 1}
NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
"""


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def example(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(256, (32, 32, 3), generator=rng, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return tmp_path / "data"


def trained(data: Path, folder: Path, *lengths: int, **settings: Any) -> dict[str, Any]:
    """Train to each length, resuming, and return the checkpoint."""
    rsgan = example("rsgan")
    for number, pairs in enumerate(lengths):
        config = replace(rsgan.PRESETS["small"], **SHORT | {"pairs": pairs} | settings)
        rsgan.train(config, 0, folder=folder, resume=number > 0, root=data, network=None)
    content: dict[str, Any] = torch.load(config.checkpoint(folder), weights_only=True)
    return content


@pytest.mark.parametrize(("game", "ema"), [("JS", 0.0), ("Rp", 0.9)])
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    game: str, ema: float, data: Path, tmp_path: Path
) -> None:
    settings = {"game": game, "ema": ema, "unroll_steps": 1}
    once = trained(data, tmp_path / "once", 3, **settings)
    again = trained(data, tmp_path / "again", 1, 3, **settings)
    for content in (once, again):
        for row in content["log"]["history"]:
            del row["seconds"]
    assert str(once["log"]["history"]) == str(again["log"]["history"])  # of NaNs too
    assert torch.equal(once["rng"], again["rng"])
    assert once["parts"].keys() == {"g", "d", "g_adam", "d_adam"} | ({"ema"} if ema else set())
    for part in once["parts"].keys() - {"g_adam", "d_adam"}:
        for key, value in once["parts"][part].items():
            assert torch.equal(value, again["parts"][part][key]), (part, key)


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("structure", ["dcgan", "resnet"])
def test_the_networks_make_and_judge_images(structure: str, size: int) -> None:
    resnets = example("lab.networks.resnets")
    torch.manual_seed(0)
    generator, discriminator = resnets.networks(structure, size, "quarter")
    images = generator(torch.randn(2, resnets.NOISE))
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2, 1)
    assert discriminator[-1].weight.norm().item() == pytest.approx(1, abs=1e-4)


def test_the_widths_are_those_of_the_authors_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    resnets = example("lab.networks.resnets")
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight: weight)  # slow where wide

    def channels(structure: str, size: int, width: str) -> tuple[list[int], list[int]]:
        nets = resnets.networks(structure, size, width)
        kinds = torch.nn.Conv2d, torch.nn.ConvTranspose2d
        g, d = (
            [layer.out_channels for layer in net.modules() if isinstance(layer, kinds)]
            for net in nets
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


def test_the_games_are_the_authors() -> None:
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


def test_the_learning_rates_fall_from_the_middle_to_nothing() -> None:
    config = example("rsgan").PRESETS["cifar-resnet"]
    rates = [config.rate(pair) for pair in (1, 50_000, 75_000, 100_000, 200_000)]
    assert rates == [1, 1, 0.5, 0, 0]


def test_a_longer_run_decays_until_its_end_and_says_what_it_is_measured_on(data: Path) -> None:
    rsgan = example("rsgan")
    given = {"preset": "small", "seed": 0, "seeds": 1, "steps": [0], "games": ["JS"]}
    (config,) = rsgan.build({**given, "data_root": data, "pairs": 200_000})
    assert config.rate(150_000) == pytest.approx(1 / 3)
    assert "none apart" not in config.data
    (config,) = rsgan.build({**given, "data_root": data / "train"})
    assert config.rate(75_000) == 0.5
    assert config.data.endswith("images, none apart for the metrics")


def test_a_run_that_leaves_the_finite_numbers_stops_and_keeps_its_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rsgan = example("rsgan")
    config = rsgan.Config(**trained(data, tmp_path / "run", 2)["settings"])
    broken = SimpleNamespace(
        generator_loss=rsgan.GAMES["JS"].generator_loss,
        discriminator_loss=lambda discriminator, fake, _: discriminator(fake).sum() * math.nan,
    )
    monkeypatch.setitem(rsgan.GAMES, "JS", broken)
    longer = replace(config, pairs=4)
    with pytest.raises(FloatingPointError, match=r"D at pair 3 of JS, K = 0, seed 0: .*of pair 2"):
        rsgan.train(longer, 0, folder=tmp_path / "run", resume=True, root=data, network=None)
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    kept = torch.load(path, weights_only=True)
    assert [row["pairs"] for row in kept["log"]["history"]] == [0, 1, 2]
    assert all(value.isfinite().all() for value in kept["parts"]["d"].values())


def main(arguments: list[object], monkeypatch: pytest.MonkeyPatch, script: str = "rsgan") -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    example(script).main()


def test_the_sampler_draws_from_the_averaged_generator_where_there_is_one(
    data: Path, tmp_path: Path
) -> None:
    rsgan = example("rsgan")
    content = trained(data, tmp_path / "run", 3, ema=0.5)
    config = rsgan.Config(**content["settings"])
    assert asdict(config)["ema"] == 0.5
    make = rsgan.sampler(config.checkpoint(tmp_path / "run"))
    images = make(4, torch.Generator().manual_seed(1))
    assert torch.equal(images, make(4, torch.Generator().manual_seed(1)))
    generator = example("lab.networks.resnets").networks("dcgan", 32, "quarter")[0]
    generator.load_state_dict(content["parts"]["g"])
    samples = example("lab.metrics.samples")
    noise = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    as_bytes = example("lab.data.pixels").as_bytes
    assert not torch.equal(images, as_bytes(samples.sample(generator, noise)))
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    samples.sample(generator, noise)
    assert all(torch.equal(v, before[name]) for name, v in generator.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--unroll-steps", "-1"), "--unroll-steps must not be negative, got -1"),
        (("--ema", "1"), "--ema must be at least 0 and less than 1, got 1.0"),
        (("--image-size", "40"), r"--image-size must be one of \[32, 48\] for dcgan, got 40"),
        (("--width", "bottleneck"), "--width bottleneck is of the ResNets, got a preset of dcgan"),
        (("--iterations", "0"), "--iterations must be positive, got 0"),
        (("--data-root", "nowhere"), "--data-root must be a folder of images, nowhere"),
        (("--features", "absent.pt"), "--features must be .*absent.pt, which does not exist"),
        (("--record", "record.csv"), "--record needs --features"),
        (("--out", "file"), "--out must be in a folder that can be written to"),
        (("--preset", "stl10"), "STL-10 is neither whole in .* nor downloadable .*no network"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    arguments: tuple[str, str],
    message: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(example("lab.data.stl10").STL10, "__init__", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    given = {"--out": "out", "--iterations": "1"} | dict([arguments])
    if arguments[0] != "--preset":
        given = {"--data-root": str(data)} | given
    with pytest.raises(SystemExit) as refused:
        main([part for option in given.items() for part in option], monkeypatch)
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
