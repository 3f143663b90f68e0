"""The image metrics have the values that follow from what they are defined as."""

import importlib
import math
import re
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.examples import example, rows

pytest.importorskip("torch_fidelity")
pytest.importorskip("sklearn")
NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())

def wrong():
    return nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1)))

def nothing():
    return None

def sampler(path, device):
    import torch
    return lambda count, rng: torch.zeros(count, 3, 16, 16, dtype=torch.uint8)
"""


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        example("lab.metrics.image_metrics"), "CLUSTERINGS", 2
    )  # for the time it takes


def write(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder


def random_images(count: int, seed: int = 0, size: int = 8) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=rng, dtype=torch.uint8)


def network(folder: Path, name: str = "build") -> str:
    (folder / "network.py").write_text(NETWORK)
    return f"{folder / 'network.py'}:{name}"


def measured(fake: Path, real: Path, tmp_path: Path, **settings: Any) -> dict[str, Any]:
    evaluate = example("evaluate")
    given = {"features": network(tmp_path), "image_size": 8} | settings
    row: dict[str, Any] = evaluate.evaluate(evaluate.Config(str(fake), str(real), **given))
    return row


def test_identical_folders_have_distance_0_and_precision_and_recall_1(tmp_path: Path) -> None:
    images = random_images(60)
    row = measured(write(tmp_path / "a", images), write(tmp_path / "b", images), tmp_path)
    assert abs(row["fid"]) < 1e-6
    assert row["kid"] < 0.01
    assert row["precision"] == row["recall"] == 1
    assert row["f_8"] == pytest.approx(1, abs=1e-2)  # the slopes are a grid
    assert row["f_1_8"] == pytest.approx(1, abs=1e-2)
    assert math.isnan(row["inception_score"])  # features without logits
    assert (row["fake"], row["real"], row["fake_images"]) == ("a", "b", 60)


def test_a_constant_image_has_recall_0(tmp_path: Path) -> None:
    constant = torch.full((60, 3, 8, 8), 128, dtype=torch.uint8)
    real = write(tmp_path / "real", random_images(60))
    row = measured(write(tmp_path / "constant", constant), real, tmp_path)
    assert row["recall"] == 0
    assert row["fid"] > 0.01


def test_the_metrics_of_shifted_features_are_known() -> None:
    metrics, features = example("lab.metrics.image_metrics"), example("lab.metrics.features")
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=rng, dtype=torch.float64)
    shift = torch.tensor([30.0, 0, 40, 0], dtype=torch.float64)
    certain = 100 * torch.eye(4, dtype=torch.float64).repeat(100, 1)
    found = metrics.measure(features.Embedding(x + shift, certain), features.Embedding(x, None))
    assert found["fid"] == pytest.approx(2500, abs=1e-6)  # equal covariances: the squared shift
    assert found["inception_score"] == pytest.approx(4, rel=0.1)  # sure, and of all four classes
    assert found["kid"] > 1
    assert found["precision"] == found["recall"] == 0
    assert set(found) == set(metrics.METRICS)


@pytest.mark.parametrize(
    ("fake", "real", "precision", "recall"),
    [
        ((0.5, 0.5), (0.5, 0.5), 1.0, 1.0),
        ((1.0, 0.0), (0.0, 1.0), 0.0, 0.0),
        ((1.0, 0.0), (0.5, 0.5), 1.0, 0.5),  # one of two modes
        ((0.5, 0.5), (1.0, 0.0), 0.5, 1.0),  # half of the samples are of no mode
    ],
)
def test_the_precision_recall_distribution_of_histograms_is_the_papers(
    fake: tuple[float, float], real: tuple[float, float], precision: float, recall: float
) -> None:
    metrics = example("lab.metrics.image_metrics")
    curve = metrics.prd_of_histograms(np.array(fake), np.array(real))
    assert curve[0].max() == pytest.approx(precision, abs=2e-3)
    assert curve[1].max() == pytest.approx(recall, abs=2e-3)
    f_8, f_1_8 = metrics.f_scores(*curve)
    for found, weight in ((f_8, 64), (f_1_8, 1 / 64)):
        total = weight * precision + recall
        best = (1 + weight) * precision * recall / total if total else 0
        assert found == pytest.approx(best, abs=1e-2)


def test_half_of_the_modes_is_full_precision_and_half_of_the_recall() -> None:
    metrics = example("lab.metrics.image_metrics")
    rng = np.random.default_rng(0)
    near = rng.normal(size=(400, 2))
    far = near + 100
    real = np.concatenate([near[:200], far[:200]])
    f_8, f_1_8 = metrics.f_scores(*metrics.prd(near[200:], real))
    assert f_8 < 0.6 < 0.8 < f_1_8


def test_a_classifier_is_trained_recorded_used_and_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 40), ("test", 10)):
        for number, name in enumerate(("dark", "light")):
            images = random_images(count, number, 16) // 4 + 180 * number
            write(tmp_path / "data" / split / name, images.byte())
    command = ["--data-root", tmp_path / "data", "--width", 4, "--batch-size", 8, "--workers", 1]

    def run(epochs: int, out: str, *more: object) -> Path:
        given = [*command, "--epochs", epochs, "--out", tmp_path / out, *more]
        example("image_classifier").main(arguments=[*map(str, given)])
        return tmp_path / out / "checkpoints" / "width4-seed0.pt"

    whole = run(2, "whole", "--record", "--records", tmp_path)
    before = whole.read_bytes()
    run(2, "whole", "--resume")
    other = write(tmp_path / "other" / "train" / "dark", random_images(4)).parents[1]
    write(other / "test" / "dark", random_images(2))
    flat = write(tmp_path / "flat" / "dark", random_images(4)).parent
    for epochs, more, message in (
        (2, (), "--out must not hold the run already"),
        (3, ("--resume",), "it has epochs 2, not 3"),
        (2, ("--resume", "--data-root", other), "it has data data, 80 images, not other, 4 images"),
        (2, ("--resume", "--data-root", flat), "has no folder test"),
    ):
        with pytest.raises(SystemExit):
            run(epochs, "whole", *more)
        assert message in capsys.readouterr().err
    assert whole.read_bytes() == before
    (row,) = rows(tmp_path / "image_classifier.csv")
    assert float(row["test_accuracy"]) == 100
    assert (row["train_images"], row["test_images"]) == ("80", "20")

    extractor = example("lab.metrics.features").load(str(whole))
    assert extractor.name.startswith(f"classifier 100.0 % {row['weights']}")
    embedding = extractor(random_images(4, size=16))
    assert embedding.features.shape == (4, 16)
    assert embedding.logits is not None and embedding.logits.shape == (4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FAKE": "nowhere"}, "FAKE must be a folder of images, a checkpoint .* no .*nowhere"),
        ({"FAKE": "empty"}, "there is none in .*empty"),
        ({"REAL": "nowhere"}, "REAL must be a folder of images"),
        ({"FAKE": "damaged.pt"}, "damaged.pt cannot be read"),
        ({"--features": "nothing"}, "--features must be inception, .* got 'nothing'"),
        ({"--features": "no.such.module:name"}, "--features must be .* No module named"),
        ({"--features": "network.py:missing"}, "--features must be .* 'missing'"),
        ({"--features": "network.py:nothing"}, r"nothing\(\) returned NoneType"),
        ({"--features": "network.py:wrong"}, "must return features .* for 30 images"),
        ({"--features": "damaged.pt"}, "damaged.pt is not such a checkpoint"),
        ({"--features": "absent.pt"}, "absent.pt, which does not exist"),
        ({"FAKE": "damaged.pt", "--sampler": "network.py:no"}, "--sampler must be the name of"),
        ({"--samples": "0"}, "--samples and --image-size must be positive"),
        ({"--records": "fake/0.png"}, "--records must be in a folder that can be written"),
        ({"--device": "no"}, "no"),
        (
            {
                "FAKE": "good.pt",
                "--sampler": "network.py:sampler",
                "--features": "network.py:build",
            },
            "--image-size must be that of the generated images, 16, got 8",
        ),
    ],
)
def test_bad_input_is_refused_by_name(
    change: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "fake", random_images(30))
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "good.pt").touch()
    network(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = {"FAKE": "fake", "REAL": "fake", "--image-size": "8"} | {
        "--features": "network.py:build"
    }
    given |= change
    options = [part for name, value in given.items() if name[0] == "-" for part in (name, value)]
    options += ["--record"] * ("--records" in given)
    with pytest.raises(SystemExit) as refused:
        example("evaluate").main([given["FAKE"], given["REAL"], *options])
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_inception_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    inception = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(inception, "load_state_dict_from_url", fail)
    with pytest.raises(RuntimeError, match=r"must fetch its weights, .* no network"):
        example("lab.metrics.features").Inception()


def test_inception_returns_what_fid_and_the_score_are_defined_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inception = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
    class_ = inception.FeatureExtractorInceptionV3
    monkeypatch.setattr(class_, "load_state_dict", lambda *_, **__: None)
    features = example("lab.metrics.features")
    seen = []
    network = features.Inception()
    network.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = random_images(2, size=32)
    embedding = features.Extractor("Inception", network.eval())(images)
    assert embedding.features.shape == (2, 2048)
    assert embedding.logits is not None and embedding.logits.shape == (2, 1008)
    assert torch.equal(seen[0], images)  # the bytes themselves
