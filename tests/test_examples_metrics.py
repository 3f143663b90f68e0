"""What samples are measured by has the values that follow from its definition; data are read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.examples import example


@pytest.fixture
def image_folder() -> Any:
    return example("lab.data.image_folder")


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


@pytest.fixture
def inversion() -> Any:
    return example("lab.metrics.inversion")


def test_points_descend_together_as_each_does_alone(inversion: Any) -> None:
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    goals, starts = torch.randn(6, 5).double(), torch.randn(6, 3).double()

    def evaluate(rows: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = z.requires_grad_()
        losses = (g(z) - goals[rows]).square().sum(1)
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        return losses.detach(), gradient

    points, losses = inversion.minimise(evaluate, starts, steps=25)
    for point, loss, start, goal in zip(points, losses, starts, goals, strict=True):
        alone = start.clone().requires_grad_()
        oracle = torch.optim.LBFGS(
            [alone],
            max_iter=25,
            max_eval=25 * inversion.EVALUATIONS,
            history_size=inversion.HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure(z: Any = alone, goal: Any = goal, oracle: Any = oracle) -> torch.Tensor:
            oracle.zero_grad()
            loss: torch.Tensor = (g(z) - goal).square().sum()
            loss.backward()
            return loss

        oracle.step(closure)
        assert (point - alone).abs().max() < 1e-6
        assert abs(loss - closure().item()) < 1e-9
    assert losses.sum() < evaluate(torch.arange(6), starts)[0].sum() / 2


def test_a_failed_evaluation_ends_all_descents(inversion: Any) -> None:
    def evaluate(*_: torch.Tensor) -> None:
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError, match="no"):
        inversion.minimise(evaluate, torch.zeros(3, 2), steps=5)


def test_a_lookup_table_reconstructs_its_images_exactly(inversion: Any) -> None:
    images = torch.rand(4, 3, 2, 2) * 2 - 1
    linear = nn.Linear(4, 12, bias=False)
    with torch.no_grad():
        linear.weight.copy_(images.flatten(1).T)
    table = nn.Sequential(linear, nn.Unflatten(1, (3, 2, 2)))
    starts = torch.randn(4, 2, 4)
    found, errors = inversion.reconstruct(table, images, starts, steps=50, batch_size=5)
    assert errors.max() < 1e-8
    assert (found - images).abs().max() < 1e-3
    other = 3 - images  # none of it in reach
    _, errors = inversion.reconstruct(table, other, starts, steps=50)
    assert errors.min() > 0.1


def test_distances_are_of_pairs_of_different_images() -> None:
    distances = example("cifar10_diversity")
    rng = torch.Generator().manual_seed(0)
    two = torch.stack([-torch.ones(3, 2, 2), torch.ones(3, 2, 2)])
    found = distances.pairwise(two, 50, rng, batch_size=7)
    assert torch.allclose(found, torch.full((50,), 48**0.5))
    bytes_ = ((two + 1) * 127.5).byte()
    assert torch.allclose(distances.pairwise(bytes_, 50, rng), found)
    assert distances.pairwise(torch.ones(5, 3, 2, 2), 9, rng).eq(0).all()
    with pytest.raises(ValueError, match="images must be two or more, got 1"):
        distances.pairwise(two[:1], 9, rng)
