"""FID, KID, Inception Score, precision and recall of generated images, for any GAN.

The generated images come from a folder or from a checkpoint of an example here. They are compared
with a folder of images or with CIFAR-10. A folder may have `train` and `test`.

    python examples/evaluate.py SAMPLES_FOLDER REAL_FOLDER
    python examples/evaluate.py runs/rsgan/checkpoints/RUN.pt cifar10
    python examples/evaluate.py runs/cifar10/checkpoints/RUN.pt cifar10 --sampler cifar10:sampler
    python examples/evaluate.py FAKE REAL --features CLASSIFIER.pt      of image_classifier.py
    python examples/evaluate.py FAKE REAL --features my_package.models:build

The features are those of the Inception network that FID is defined on, unless --features names
another network. Which numbers can be compared with published ones:

    Inception, 10,000 images of each side, all of CIFAR-10's test images   with RS-GAN's eval.py
    Inception, 50,000 generated images, all of CIFAR-10's training images  with most later tables
    other counts, or a part of a data set     only with each other: FID grows as counts shrink
    other features, such as a classifier's    only with each other
    precision and recall                      only at equal counts and features: their balls
                                              around samples shrink as counts grow
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro
from lab import columns, records, runs
from lab.data import image_folder
from lab.data.image_folder import Sampler, subset
from lab.metrics import features, image_metrics
from torch import Tensor

CIFAR = "cifar10"
RULE = "--sampler must be the name of a function, as in rsgan:sampler or file.py:name"
KEY = ("fake", "fake_hash", "real", "features", "real_images", "size", "seed", "revision")


@dataclass(frozen=True)
class Config:
    """The two sets of images that are compared, and the features."""

    fake: tyro.conf.Positional[str]  # a folder of generated images, or a checkpoint
    real: tyro.conf.Positional[str]  # a folder of images, or cifar10
    split: Literal["train", "test"] = "test"  # of REAL, where it has both
    fake_split: Literal["train", "test"] = "train"  # of FAKE, where it has both
    features: str = "inception"  # or a checkpoint of image_classifier.py, or file.py:name
    sampler: str = "rsgan:sampler"  # the function that opens a checkpoint
    samples: int = 10_000  # images of each side, or all where there are fewer
    image_size: int = 32  # pixels a side
    seed: int = 0  # of samples, subsets and clusters
    device: str = "cpu"  # cpu, cuda, mps
    record: bool = False  # append a row to the record
    records: Path = records.RESULTS  # the folder of the records


def read(where: str, split: str, config: Config, option: str) -> tuple[str, Tensor]:
    """Return images of bytes, and the name that the record gives them."""
    path = Path(where)
    if path.suffix == ".pt":
        open_checkpoint = features.named(config.sampler, RULE)
        try:
            make: Sampler = open_checkpoint(path, config.device)
        except Exception as error:  # torch.load raises whatever a damaged file leads to
            raise ValueError(
                f"{option} {path} cannot be read by --sampler {config.sampler}: {error}"
            ) from error
        found = make(config.samples, torch.Generator(config.device).manual_seed(config.seed))
        if found.dtype != torch.uint8 or found.ndim != 4:
            raise TypeError(
                f"--sampler {config.sampler} must make images of bytes (N, 3, H, W), got "
                f"{found.dtype} {tuple(found.shape)}"
            )
        return path.stem, found
    root = None if where == CIFAR else path
    if root is not None and not root.is_dir():
        raise ValueError(
            f"{option} must be a folder of images, a checkpoint (*.pt) or {CIFAR}, there is no "
            f"{where}"
        )
    images = image_folder.load(root, split=split, size=config.image_size)
    inside = root is not None and (root / split).is_dir()
    name = f"{images.name}/{split}" if inside or root is None else images.name
    return name, subset(images.pixels, config.samples, config.seed)


def evaluate(config: Config) -> dict[str, str | int | float]:
    """Return the row of the record."""
    started = time.process_time()
    network = features.load(config.features, config.device)
    fake_name, fake = read(config.fake, config.fake_split, config, "FAKE")
    real_name, real = read(config.real, config.split, config, "REAL")
    if fake.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"--image-size must be that of the generated images, {fake.shape[-1]}, got "
            f"{config.image_size}"
        )
    found = image_metrics.measure(network(fake), network(real), seed=config.seed)
    return {
        "experiment": "evaluate",
        "fake": fake_name,
        "real": real_name,
        "features": network.name,
        "fake_images": len(fake),
        "fake_hash": runs.digest({"": fake}),
        "real_images": len(real),
        "size": config.image_size,
        "seed": config.seed,
        **found,
        "seconds": round(time.process_time() - started, 1),
        "device": config.device,
        **runs.provenance(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    flags = (tyro.conf.FlagCreatePairsOff,)
    config = tyro.cli(Config, description=__doc__, args=arguments, config=flags)
    try:
        if config.samples < 1 or config.image_size < 1:
            raise ValueError(f"--samples and --image-size must be positive, got {config}")
        torch.empty(0, device=config.device)
        if config.record:
            runs.check_writable("--records", config.records)
        row = evaluate(config)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        runs.refuse(error)
    frame = pd.DataFrame([row | {"setting": "{fake} against {real} by {features}".format_map(row)}])
    print(columns.table(frame, ["fake_images", "real_images", *image_metrics.METRICS]))
    print("\n" + columns.sentence(frame, "fid", "has a FID of {}"))
    path = config.records / "evaluate.csv"
    if config.record and not records.append(path, row, key=KEY):
        print(f"{path} has these numbers already")


if __name__ == "__main__":
    main()
