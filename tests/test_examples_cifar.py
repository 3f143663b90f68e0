"""The CIFAR-10 experiment: its images, its training, what is measured and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_examples import example


@pytest.fixture
def image_folder(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("lab.image_folder", monkeypatch)


def images(folder: Path, count: int = 8, *, size: int = 32) -> np.ndarray:
    """Write images of two classes, and return their pixels in the order of their names."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        name = folder / ("cat" if number < count // 2 else "dog") / f"{number}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(name)
    return pixels


def test_a_folder_of_images_is_read_once_and_as_it_is(image_folder: Any, tmp_path: Path) -> None:
    root, cache = tmp_path / "two", tmp_path / "cache"
    pixels = images(root / "train")
    found = image_folder.load(root, cache=cache)
    assert found.name == "two"
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    assert np.array_equal(found.pixels.permute(0, 2, 3, 1).numpy(), pixels)
    scaled = image_folder.batch(found.pixels, torch.arange(8))
    assert (scaled.min(), scaled.max()) == (-1, 1)

    (kept,) = cache.iterdir()
    assert torch.equal(torch.load(kept), found.pixels)
    kept.write_bytes(b"damaged")
    assert torch.equal(image_folder.load(root, cache=cache).pixels, found.pixels)
    (root / "train" / "dog" / "7.png").unlink()
    assert len(image_folder.load(root, cache=cache).pixels) == 7


def test_images_of_another_size_are_fitted(image_folder: Any, tmp_path: Path) -> None:
    images(tmp_path / "flat", 2, size=40)
    flat = image_folder.load(tmp_path / "flat" / "cat", size=16, cache=tmp_path / "cache")
    assert flat.pixels.shape == (1, 3, 16, 16)
    assert flat.classes == ("",)


def test_wrong_folders_and_damaged_images_are_named(image_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data-root .* no/where is no folder: give"):
        image_folder.load(Path("no/where"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"--data-root must be a folder of images .*text"):
        image_folder.load(tmp_path / "text")
    images(tmp_path / "two" / "train", 2)
    with pytest.raises(FileNotFoundError, match="has a folder train, but none for test"):
        image_folder.load(tmp_path / "two", split="test")
    with pytest.raises(ValueError, match="split must be one of train, test, got 'all'"):
        image_folder.load(tmp_path / "two", split="all")
    damaged = tmp_path / "two" / "train" / "cat" / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"0\.png is not a readable image .* mend or remove it"):
        image_folder.load(tmp_path / "two", cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_a_warning(image_folder: Any, tmp_path: Path) -> None:
    images(tmp_path / "two")
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="decoded images are not kept"):
        found = image_folder.load(tmp_path / "two", cache=tmp_path / "file")
    assert len(found.pixels) == 8


def test_cifar10_that_is_not_there_or_damaged_is_an_error(
    image_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNROLL_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"nor downloadable \(no network\).*--data-root"):
        image_folder.load()
    (tmp_path / "copy" / image_folder.BATCHES).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is neither whole in .*copy"):
        image_folder.load(tmp_path / "copy")
