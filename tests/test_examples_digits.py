"""MNIST in memory, the classifier's file, coverage of classes, grids of images."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests import tiny_mnist

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WHERE = {
    "digits": "lab.data.digits",
    "pixels": "lab.data.pixels",
    "classifier": "lab.metrics.classifier",
    "coverage": "lab.metrics.coverage",
    "images": "lab.figures.images",
    "plots": "lab.figures.plots",
}


@pytest.fixture(name="lab")
def _lab(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)

    class Lab:
        def __getattr__(self, name: str) -> Any:
            return importlib.import_module(WHERE[name])

    return Lab()


def test_digits_are_in_range_and_padded_with_black(lab: Any, tmp_path: Path) -> None:
    root = tiny_mnist.write(tmp_path)
    small, large = (lab.digits.mnist(root, size=size) for size in (28, 32))
    assert large.images.shape == (60, 1, 32, 32)
    assert torch.equal(large.images[..., 2:-2, 2:-2], small.images)
    assert large.images.sum() == small.images.sum()
    floats = lab.pixels.as_floats(small.images)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert (small.labels == torch.arange(60) % 10).all()
    with pytest.raises(ValueError, match=r"size must be one of \(28, 32\), got 30"):
        lab.digits.mnist(root, size=30)


def test_stacks_have_independent_digits_in_their_colours(lab: Any, tmp_path: Path) -> None:
    data = lab.digits.mnist(tiny_mnist.write(tmp_path))
    stacks, again = (data.stacks(500, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(stacks, again)
    assert stacks.shape == (500, 3, 28, 28)
    channels = stacks.flatten(0, 1)
    one_of_ten = data.at(torch.arange(10)).squeeze(1)
    found = (channels[:, None] == one_of_ten).flatten(2).all(2)
    assert (found.sum(1) == 1).all()
    modes = lab.coverage.stack_labels(found.int().argmax(1).view(500, 3))
    assert len(modes.unique()) > 300
    single = data.sample(7, torch.Generator().manual_seed(0))
    assert single.shape == (7, 1, 28, 28)


def test_missing_and_damaged_data_are_named(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data-root .* must be a folder with MNIST/raw"):
        lab.digits.mnist(tmp_path / "nowhere")
    monkeypatch.setenv("UNROLL_DATA", str(tmp_path / "nowhere either"))
    with pytest.raises(FileNotFoundError, match=r"got .*nowhere either"):
        lab.digits.mnist()
    raw = tiny_mnist.write(tmp_path / "damaged") / "MNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-100])
    with pytest.raises(RuntimeError, match="incomplete or damaged"):
        lab.digits.mnist(tmp_path / "damaged")
    images.write_bytes(whole)
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([11]))
    with pytest.raises(RuntimeError, match="labels from 0 to 11"):
        lab.digits.mnist(tmp_path / "damaged")
    labels.unlink()
    with pytest.raises(RuntimeError, match="incomplete or damaged"):
        lab.digits.mnist(tmp_path / "damaged")


def test_a_damaged_download_is_named(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[dict[str, Any]] = []

    def download(*_: Any, **options: Any) -> None:
        wanted.append(options)
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.delenv("UNROLL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.MNIST", download)
    with pytest.raises(RuntimeError, match=r"MNIST in data.* cannot be read \(File not found"):
        lab.digits.mnist()
    assert wanted == [{"train": True, "download": True}]


def test_coverage_of_known_samples(lab: Any) -> None:
    coverage = lab.coverage
    every = torch.arange(1000).repeat(3)
    assert coverage.mode_metrics(every) == {"modes": 1000, "reverse_kl": pytest.approx(0)}
    one = coverage.stack_labels(torch.full((50, 3), 7))
    assert (one == 777).all()
    metrics = coverage.mode_metrics(one)
    assert metrics["modes"] == 1
    assert metrics["reverse_kl"] == pytest.approx(math.log(1000))
    half = coverage.mode_metrics(torch.arange(500).repeat(2))
    assert half == {"modes": 500, "reverse_kl": pytest.approx(math.log(2))}
    classes = coverage.class_metrics(torch.tensor([3, 3, 3, 5]))
    assert classes["class_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert (classes["classes"], classes["dominant_class"], classes["dominant_share"]) == (
        2,
        3,
        0.75,
    )


def test_a_generator_that_copies_data_scores_the_floor(lab: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (25_600, 3), generator=rng)
    metrics = lab.coverage.mode_metrics(lab.coverage.stack_labels(labels))
    assert metrics["modes"] == 1000
    floor = 999 / (2 * 25_600)  # of KL over 1,000 bins, to first order
    assert metrics["reverse_kl"] == pytest.approx(floor, rel=0.1)


class Bars(nn.Module):
    """Tells the digits of tiny_mnist apart by their height."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean((1, 3)).unfold(1, 3, 2).sum(2)
        return rows[:, 1:11]


def test_classify_takes_digits_and_stacks_with_and_without_a_margin(
    lab: Any, tmp_path: Path
) -> None:
    classify = lab.classifier.classify
    for size in (28, 32):
        data = lab.digits.mnist(tiny_mnist.write(tmp_path / str(size)), size=size)
        assert torch.equal(classify(Bars(), data.at(torch.arange(60))), data.labels)
        index = torch.arange(60).view(20, 3)
        stacks = data.at(index).squeeze(2)
        assert torch.equal(classify(Bars(), stacks, batch_size=7), data.labels[index])
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], got from 0 to 255"):
        classify(Bars(), data.images.float())
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], got from nan"):
        classify(Bars(), torch.full((1, 1, 28, 28), torch.nan))
    with pytest.raises(ValueError, match=r"images must be \(N, 1 or 3, 28 or 32"):
        classify(Bars(), torch.zeros(2, 2, 28, 28))


def test_precision_tells_digits_from_what_a_classifier_may_be_certain_of(
    lab: Any, tmp_path: Path
) -> None:
    data = lab.digits.mnist(tiny_mnist.write(tmp_path))
    judge = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))  # features: pixels
    real, rng = data.at(torch.arange(60)), torch.Generator().manual_seed(0)
    noise = 2 * torch.rand(real.shape, generator=rng) - 1
    stacks = data.stacks(20, rng)
    for samples, wanted in ((real, 1.0), (noise, 0.0), (stacks, 1.0), (real.roll(9, 2), 0.0)):
        assert lab.classifier.precision(judge, samples, real) == wanted
    assert lab.classifier.precision(judge, torch.cat([real, noise]), real) == 0.5


def test_the_classifier_is_the_same_from_its_file(lab: Any, tmp_path: Path) -> None:
    classifier = lab.classifier
    network = classifier.network()
    x = torch.rand(64, 1, 28, 28) * 2 - 1
    network(x)  # moves BatchNorm's statistics away from where they start
    path = tmp_path / "a" / "classifier.pt"
    facts = {"widths": list(classifier.WIDTHS), "test_accuracy": 99.4}
    digest = classifier.save(path, network, facts)
    assert classifier.facts(path) == {"classifier": digest, "classifier_accuracy": 99.4}
    folded = classifier.load(path)
    assert torch.allclose(folded(x), network.eval()(x), atol=1e-4)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded)
    content = torch.load(path, weights_only=True)
    content["states"]["0.weight"] += 1e-6
    torch.save(content, path)
    with pytest.raises(RuntimeError, match=r"cannot be read .*hash"):
        classifier.load(path)
    path.write_bytes(b"half a file")
    with pytest.raises(RuntimeError, match="delete it, and it is trained again"):
        classifier.load(path)
    with pytest.raises(FileNotFoundError, match="--classifier must be a trained classifier"):
        classifier.load(tmp_path / "none.pt")


def test_the_classifier_is_trained_where_there_is_none(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, classifier = tiny_mnist.write(tmp_path / "data", 100), lab.classifier
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    with pytest.raises(RuntimeError, match=r"% of the test digits are right, not 99.3"):
        classifier.train(tmp_path / "poor.pt", root, epochs=1)
    assert not (tmp_path / "poor.pt").exists()
    monkeypatch.setenv("UNROLL_CLASSIFIER", str(tmp_path / "own.pt"))
    train = classifier.train
    monkeypatch.setattr(
        classifier, "train", lambda path, root: train(path, root, epochs=1, enough=0)
    )
    options = classifier.Options(data_root=root)
    known = classifier.prepared(options)
    assert known == classifier.facts(tmp_path / "own.pt")
    assert train(tmp_path / "again.pt", root, epochs=1, enough=0) == known["classifier"]
    monkeypatch.setattr(classifier, "train", None)
    assert classifier.prepared(options) == known  # once


def test_pictures_show_every_image_where_it_belongs(lab: Any, tmp_path: Path) -> None:
    pictures = lab.images
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 1, 4, 4)
    tile = pictures.tile(images, 3)
    assert tile.shape == (3, 11, 16)
    assert torch.allclose(tile[0, 1::5, 1::5][:2, :3].flatten(), torch.linspace(0, 1, 6))
    assert tile[0, 0, 0] == 1
    pictures.write(tmp_path / "new" / "tile.png", images, 3)
    with Image.open(tmp_path / "new" / "tile.png") as image:
        assert image.size == (16, 11)
    rows = {"K = 0": [tile, tile], "K = 10": [tile]}
    path = tmp_path / "grid.png"
    lab.plots.grid(path, rows, ["0", "10"], pictures.show, size=(3, 3), caption="pairs")
    assert path.stat().st_size > 0
    assert lab.plots.spread(9, 3) == [0, 4, 8]
    assert lab.plots.spread(2, 5) == [0, 1]
