"""The CIFAR-10 experiment: its images, its training, what is measured and what is refused."""

import importlib
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.multiprocessing.spawn import spawn

from tests.test_examples import EXAMPLES, example, rows


@pytest.fixture
def image_folder(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("lab.data.image_folder", monkeypatch)


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


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("cifar10", monkeypatch)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images(tmp_path / "two" / "train")
    return tmp_path / "two"


TINY: dict[str, Any] = {
    "data": "two", "images": 8, "size": 1 / 32, "batch_size": 4, "noise_size": 6,
    "unroll_steps": 1, "evaluate_every": 2, "pairs": 4,
}  # fmt: skip
FLAGS = ("--size", "0.03125", "--batch-size", "4", "--iterations", "2", "--workers", "1")


def trained(module: Any, folder: Path, root: Path, *lengths: int, **settings: Any) -> Any:
    """Train to each length, resuming, and return the checkpoint."""
    for number, pairs in enumerate(lengths):
        config = replace(module.PRESETS["small"], **{**TINY, **settings, "pairs": pairs})
        module.train(config, 0, folder=folder, resume=number > 0, root=root)
    return torch.load(config.checkpoint(folder), weights_only=True)


def ended(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """Return what a command that is refused says, or what one that ends early does."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        module.main()
    return str(ending.value.code)


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "amp": True, "channels_last": True,
                                           "checkpointed": True}])  # fmt: skip
def test_training_resumes_to_the_same_numbers(
    cifar10: Any, root: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    once = trained(cifar10, tmp_path / "once", root, 4, **settings)
    again = trained(cifar10, tmp_path / "again", root, 3, 4, **settings)
    for content in (once, again):
        for row in content["log"]["history"]:
            del row["seconds"]
    assert str(once["log"]["history"]) == str(again["log"]["history"])
    pictures = zip(once["log"]["snapshots"], again["log"]["snapshots"], strict=True)
    assert all(torch.equal(*pair) for pair in pictures)
    for part in once["parts"].keys() - {"g_adam", "d_adam"}:
        for key, tensor in once["parts"][part].items():
            assert torch.equal(tensor, again["parts"][part][key]), (part, key)
    samples, _ = cifar10.trained(tmp_path / "once" / "checkpoints" / "K1-seed0.pt")
    assert samples(torch.randn(3, 6)).shape == (3, 3, 32, 32)


def test_the_networks_are_those_of_appendix_d(monkeypatch: pytest.MonkeyPatch) -> None:
    dcgan = example("lab.networks.dcgan", monkeypatch)
    rng = torch.Generator()
    g, d = dcgan.generator(1, rng), dcgan.discriminator(1, rng)
    assert d(g(torch.randn(2, 256))).shape == (2, 1)
    shapes = [tuple(p.shape) for p in g.parameters() if p.ndim > 1]
    assert shapes == [(8192, 256), (512, 256, 3, 3), (256, 128, 3, 3), (128, 64, 3, 3),
                      (64, 3, 3, 3)]  # fmt: skip
    shapes = [tuple(p.shape) for p in d.parameters() if p.ndim > 1]
    assert shapes == [(64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (1, 4096)]
    leaks = [m.negative_slope for m in (*g, *d) if isinstance(m, nn.LeakyReLU)]
    assert leaks == [0.3] * 7
    with pytest.raises(ValueError, match="--size must leave every layer a channel"):
        dcgan.generator(1 / 1000, rng)


def test_training_stops_at_numbers_that_are_not_finite(
    cifar10: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10.runs, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    real, calls = cifar10.image_folder.batch, []

    def failing(pixels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        calls.append(chosen)
        found: torch.Tensor = real(pixels, chosen)
        return found * (torch.nan if len(calls) > 5 else 1)  # two a pair

    monkeypatch.setattr(cifar10.image_folder, "batch", failing)
    out = tmp_path / "out"
    said = ended(cifar10, monkeypatch, "--data-root", root, "--unroll-steps", "0", *FLAGS,
                 "--iterations", "4", "--evaluate-every", "2", "--out", out)  # fmt: skip
    assert "G at pair 3 of K=0 seed 0: the loss" not in said  # minimax alone sees real images
    assert "D at pair 4 of K=0 seed 0: the loss and its gradient must be finite" in said
    assert "K0-seed0.pt is of pair 2" in said
    content = torch.load(out / "checkpoints" / "K0-seed0.pt", weights_only=True)
    assert all(p.isfinite().all() for p in content["parts"]["d"].values())


def test_training_stops_at_a_step_that_overflows(
    cifar10: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    said = ended(cifar10, monkeypatch, "--data-root", root, "--unroll-steps", "0", *FLAGS,
                 "--iterations", "1", "--discriminator-lr", "1e38", "--out", out)  # fmt: skip
    assert "D at pair 1 of K=0 seed 0: the step must leave the parameters finite" in said
    assert not list(out.rglob("*.pt"))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_last_checkpoint_whole(
    cifar10: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    out = tmp_path / "out"
    command = ("--data-root", root, "--unroll-steps", "0", *FLAGS, "--out", out)
    monkeypatch.setattr(sys, "argv", ["cifar10.py", *map(str, command)])
    cifar10.main()
    (path,) = (out / "checkpoints").iterdir()
    before = path.read_bytes()

    def half(draft: Path, content: Any) -> None:
        with draft.open("wb") as file:
            file.write(content[:100])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", half)
    said = ended(cifar10, monkeypatch, *command, "--iterations", "4", "--resume")
    assert "--resume continues" in said
    assert isinstance(failure, KeyboardInterrupt) or "No space left on device" in said
    assert [*(out / "checkpoints").iterdir()] == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--data-root", "no/where"), "no/where is no folder: give another"),
        (("--ema", "1"), "--ema must be at least 0 and below 1, got 1.0"),
        (("--unroll-steps", "-1"), "--unroll-steps must not be negative, got -1"),
        (("--size", "0"), "--size must be positive, got 0.0"),
        (("--batch-size", "1"), "--batch-size must be at least 2"),
        (("--generator-lr", "0"), "--generator-lr must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    cifar10: Any,
    root: Path,
    arguments: tuple[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ("--out", tmp_path / "out")
    assert ended(cifar10, monkeypatch, "--data-root", root, *FLAGS, *arguments, *out) == "2"
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_records_draws_and_is_measured(
    cifar10: Any,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, record = tmp_path / "out", tmp_path / "cifar10.csv"
    command = ("--data-root", root, "--unroll-steps", "0", "1", *FLAGS, "--out", out)
    monkeypatch.setattr(sys, "argv", ["cifar10.py", *map(str, command), "--record", str(record)])
    cifar10.main()
    found = [(r["unroll_steps"], r["pairs"], r["data"], r["images"]) for r in rows(record)]
    assert sorted(found) == [("0", "2", "two", "8"), ("1", "2", "two", "8")]
    for name in ("cifar10_samples", "cifar10_training", "cifar10_losses"):
        assert (out / f"{name}.png").stat().st_size > 0

    assert ended(cifar10, monkeypatch, *command) == "2"
    assert "--out must not hold the run already" in capsys.readouterr().err
    assert ended(cifar10, monkeypatch, *command, "--resume", "--ema", "0.5") == "2"
    assert "ema 0.0, not 0.5" in capsys.readouterr().err

    diversity = importlib.import_module("cifar10_diversity")
    less = ("--targets", "3", "--starts", "2", "--steps", "3", "--samples", "6")
    given: list[Any] = ["--checkpoints", out / "checkpoints", "--out", tmp_path / "measured", *less]
    given += ["--distances", "20", "--data-root", root, "--record", tmp_path]
    for _ in range(2):  # the second time from what is kept
        diversity.main([*map(str, given)])
    inverted = rows(tmp_path / "cifar10_inversion.csv")
    assert len({(r["unroll_steps"], r["image"]) for r in inverted}) == len(inverted) == 6
    measured = rows(tmp_path / "cifar10_distances.csv")
    assert [row["unroll_steps"] for row in measured] == ["0", "1"]
    for name in ("cifar10_reconstructions_seed0", "cifar10_distances"):
        assert (tmp_path / "measured" / f"{name}.png").stat().st_size > 0

    make = cifar10.sampler(out / "checkpoints" / "K0-seed0.pt")
    drawn = make(3, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.uint8 and drawn.shape == (3, 3, 32, 32)
    assert torch.equal(drawn, make(3, torch.Generator().manual_seed(0)))

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit):
            diversity.main([*map(str, given), *more])
        return str(capsys.readouterr().err)

    assert "K0-seed0.pt cannot be resumed, it has starts 2, not 1" in refused("--starts", "1")
    assert "--targets must be at most 8, got 9" in refused("--targets", "9")
    assert "has none of K*" in refused("--checkpoints", str(tmp_path))
    (root / "train" / "dog" / "7.png").unlink()
    assert "--data-root must be what" in refused()
    path = out / "checkpoints" / "K1-seed0.pt"
    content = torch.load(path, weights_only=True)
    content["settings"]["pairs"] = 5
    torch.save(content, path)
    assert "must be finished, it is at pair 2 of 5: continue it" in refused()


def _rank(rank: int, world: int, folder: str) -> None:
    """Train as a process of torchrun, without BatchNorm, whose statistics are a rank's own."""
    sys.path.insert(0, str(EXAMPLES))
    cifar10 = importlib.import_module("cifar10")
    cifar10.dcgan._normalised = lambda _: [nn.LeakyReLU(0.3)]
    if world > 1:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": (Path(folder) / "port").read_text()}
        os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2", **address}
        cifar10.ranks.join("cpu")
    root = Path(folder, "two")
    out = Path(folder, f"out{world}")
    config = replace(cifar10.PRESETS["small"], **TINY, ranks=world)
    cifar10.train(config, 0, folder=out, resume=False, root=root)
    cifar10.ranks.leave()


def test_two_ranks_train_as_one_process_does(
    cifar10: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    spawn(_rank, (2, str(tmp_path)), nprocs=2)
    monkeypatch.setattr(cifar10.dcgan, "_normalised", lambda _: [nn.LeakyReLU(0.3)])
    one = trained(cifar10, tmp_path / "out1", root, 4)
    (path,) = (tmp_path / "out2" / "checkpoints").iterdir()
    two = torch.load(path, weights_only=True)
    for part in "gd":
        for key, tensor in one["parts"][part].items():
            assert (tensor - two["parts"][part][key]).abs().max() < 1e-5, key


@pytest.fixture
def inversion(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("lab.metrics.inversion", monkeypatch)


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


def test_distances_are_of_pairs_of_different_images(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = example("lab.metrics.distances", monkeypatch)
    rng = torch.Generator().manual_seed(0)
    two = torch.stack([-torch.ones(3, 2, 2), torch.ones(3, 2, 2)])
    found = distances.pairwise(two, 50, rng, batch_size=7)
    assert torch.allclose(found, torch.full((50,), 48**0.5))
    bytes_ = ((two + 1) * 127.5).byte()
    assert torch.allclose(distances.pairwise(bytes_, 50, rng), found)
    assert distances.pairwise(torch.ones(5, 3, 2, 2), 9, rng).eq(0).all()
    with pytest.raises(ValueError, match="images must be two or more, got 1"):
        distances.pairwise(two[:1], 9, rng)
    assert abs(distances.wasserstein(found, found + 1.5) - 1.5) < 1e-5
    edges, densities = distances.histograms([found, found + 1], bins=10)
    assert all(abs((density * np.diff(edges)).sum() - 1) < 1e-9 for density in densities)
