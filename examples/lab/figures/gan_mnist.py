"""The figures of `gan_mnist.py`: samples, losses, and what D makes of the pattern."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lab import records, runs
from lab.data.pixels import as_floats
from lab.figures import pictures, plots

SAMPLING = {
    "classes": "classes with a sample",
    "classes_of_a_percent": "classes with 1 % of the samples",
    "class_entropy": "entropy of the classes",
    "variance": "variance of samples / of data",
}
EXPLANATION = {
    "d_gradient": "norm of D's gradient",
    "d_update": "norm of D's update",
    "d_on_real": "D(data)",
    "d_on_fake": "D(samples)",
    "d_on_pattern": "D(pattern)",
    "learned": "fall of D(pattern)",
}
LOSSES = {"d_loss": "D's loss", "g_loss": "G's loss, as trained"}


class Run(Protocol):
    """What a run is known by."""

    preset: str
    optimizer: str
    unroll_steps: int
    seed: int

    @property
    def label(self) -> str:
        """Return the name of its setting."""
        ...

    def checkpoint(self, folder: Path) -> Path:
        """Return where it is kept."""
        ...


def report(out: Path, folder: Path, configs: Sequence[Run]) -> None:
    """Write the time series and the figures of some runs, and print the tables."""
    histories: dict[str, list[Any]] = {}
    snapshots: dict[str, list[Tensor]] = {}
    series = []
    for config in sorted(configs, key=lambda config: (config.label, config.seed)):
        log = runs.read_log(config.checkpoint(out))
        histories.setdefault(config.label, []).append(log["history"])
        snapshots.setdefault(config.label, log["snapshots"])
        run = {"optimizer": config.optimizer, "unroll_steps": config.unroll_steps}
        series += [run | {"seed": config.seed} | row for row in log["history"]]
    records.write(out / "metrics.csv", series)
    print(records.table(histories, SAMPLING))
    print(records.table(histories, EXPLANATION))

    pairs = [row["pairs"] for row in series if row["seed"] == configs[0].seed]
    pairs = sorted(set(pairs))
    moments = pictures.spread(len(pairs), 3)
    pictures.grid(
        folder / "gan_mnist_samples.png",
        {
            k.replace(", ", "\n"): [as_floats(s[m][:16]) for m in moments]
            for k, s in snapshots.items()
        },
        [f"{pairs[m]:,}" for m in moments],
        caption=f"pairs of updates (preset {configs[0].preset}, seed {configs[0].seed})",
    )
    draw = partial(plots.curves, histories=histories, x="pairs")
    draw(folder / "gan_mnist_sampling.png", metrics=SAMPLING, ideal={"variance": 1, "classes": 10})
    draw(folder / "gan_mnist_explanation.png", metrics=EXPLANATION, ideal={"d_on_pattern": 0.5})
    draw(folder / "gan_mnist_losses.png", metrics=LOSSES, ideal={})
    print(f"\nTime series, settings and checkpoints are in {out}/, figures in {folder}/")


def generate(
    checkpoint: Path,
    folder: Path,
    build: Callable[[int, float], nn.Module],
    seed: int,
    count: int = 49,
) -> Path:
    """Write new samples of a trained generator, one a file and all in a grid.

    Args:
        checkpoint: Of its run.
        folder: Where a folder for them is made.
        build: Given the size of the noise and BatchNorm's eps, returns an untrained generator.
        seed: Of the noise.
        count: How many.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        settings = content["settings"]
        noise_size, eps = settings["noise_size"], settings["batch_norm_eps"]
        generator = build(noise_size, eps).eval()
        generator.load_state_dict(content["parts"]["g"])
    except Exception as error:  # pickle, zip and torch have one each
        raise ValueError(
            f"--generate must be a checkpoint of gan_mnist.py, {checkpoint} is none ({error}): "
            "they are in the folder checkpoints/ of --out"
        ) from error
    target = folder / "generated" / checkpoint.stem
    if target.exists():
        raise ValueError(
            f"--out must not hold these samples already, there is {target}: give another folder"
        )
    noise = torch.randn(count, noise_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        images = generator(noise).view(-1, 1, 28, 28) * 2 - 1
    for number, image in enumerate(images):
        pictures.write(target / f"{number:02}.png", image[None], columns=1)
    pictures.write(target / "grid.png", images, columns=7)
    return target
