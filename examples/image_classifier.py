"""A small classifier, whose features `evaluate.py` can compare images by in place of Inception's.

FID and its relatives are defined on the features of an Inception network that was trained on
ImageNet and is fetched from the net. This trains a small convolutional network on the images at
hand, in minutes on one core, and says how well it classifies the test images. Numbers by its
features rank generators; they are comparable with nothing that was computed by other features.

    python examples/image_classifier.py --data-root FOLDER      FOLDER/train/CLASS/*.png, /test/...
    python examples/image_classifier.py                         CIFAR-10, by torchvision
    python examples/evaluate.py FAKE REAL --features runs/image_classifier/checkpoints/FILE.pt
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lab import cli, runs
from lab.data import image_folder
from lab.metrics.features import Classifier, Extractor, classes, fingerprint
from torch import Tensor

EXPERIMENT = "image_classifier"
SHIFT = 4  # pixels at most, of an augmented image
WARM_UP = 0.2  # of the training


@dataclass(frozen=True)
class Config:
    """A training: SGD with momentum and a learning rate that rises and falls linearly."""

    unroll_steps: ClassVar[int] = 0  # there is no game
    width: int = 24
    epochs: int = 8
    batch_size: int = 128
    peak_lr: float = 0.15
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    device: str = "cpu"
    data: str = ""

    def checkpoint(self, folder: Path) -> Path:
        """Return where the classifier is kept."""
        return folder / "checkpoints" / f"width{self.width}-seed{self.seed}.pt"


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """Return a batch, half of it mirrored, all of it moved by up to 4 pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=rng, device=rng.device) < 0.5
    height, width = images.shape[2:]
    up, left = torch.randint(2 * SHIFT + 1, (2,), generator=rng, device=rng.device).tolist()
    padded = F.pad(torch.where(mirrored, images.flip(-1), images), [SHIFT] * 4, mode="reflect")
    return padded[:, :, up : up + height, left : left + width]


def train(config: Config, line: int, *, folder: Path, resume: bool, root: Path | None) -> Config:
    """Train the classifier; what comes of it is in its checkpoint."""
    torch.set_num_threads(1)
    data, test = (image_folder.load(root, split=split) for split in ("train", "test"))
    pixels, labels = (part.to(config.device) for part in (data.pixels, data.labels))
    torch.manual_seed(config.seed)
    rng = torch.Generator(config.device).manual_seed(config.seed)
    network = Classifier(len(data.classes), config.width).to(config.device)
    optimizer = torch.optim.SGD(
        network.parameters(),
        config.peak_lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )

    def evaluate(_: int, __: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        extractor = Extractor("classifier", network.eval(), config.device)
        guesses = classes(extractor(test.pixels))
        network.train()
        right = (guesses == test.labels).double().mean().item()
        return {
            "data": data.name,
            "train_images": len(data.labels),
            "test_images": len(test.labels),
            "test_accuracy": 100 * right,
            "weights": fingerprint(network),
        }, None

    epochs = runs.iterate(
        config.checkpoint(folder),
        asdict(config),
        {"net": network, "sgd": optimizer},
        rng,
        evaluate,
        length=config.epochs,
        every=1,
        resume=resume,
        bar={"desc": f"classifier of {data.name}", "position": line, "unit": "epoch"},
        counts="epochs",
    )
    for epoch in epochs:
        order = torch.randperm(len(labels), generator=rng, device=rng.device)
        batches = order.split(config.batch_size)
        for step, chosen in enumerate(batches):
            done = (epoch - 1 + (step + 0.5) / len(batches)) / config.epochs
            rate = config.peak_lr * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
            optimizer.param_groups[0]["lr"] = rate
            images = augmented(image_folder.batch(pixels, chosen), rng)
            loss = F.cross_entropy(network(images)[1], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of a finished training."""
    last = log["history"][-1]
    return [{"experiment": EXPERIMENT} | asdict(config) | last | log["provenance"]]


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the classifier").add_argument
    add(
        "--data-root",
        type=Path,
        metavar="FOLDER",
        help="train and test folders, with a folder of images for each class (default: CIFAR-10)",
    )
    add("--width", type=cli.positive, help="channels of the first layer (default: 24)")
    add("--epochs", type=cli.positive, help="passes over the training images (default: 8)")
    add("--batch-size", type=cli.positive, metavar="N", help="default: 128")
    cli.add_run_flags(parser, EXPERIMENT)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    known = {name: value for name, value in given.items() if name in Config.__match_args__}
    train, test = (image_folder.load(given.get("data_root"), split=s) for s in image_folder.SPLITS)
    if torch.equal(train.pixels, test.pixels):
        raise ValueError(
            f"--data-root must have test images apart, {given['data_root']} has no folder test: "
            "put some of the images there, and the others in train"
        )
    first = Config(**known, data=f"{train.name}, {len(train.pixels):,} images")
    return [replace(first, seed=first.seed + number) for number in range(given["seeds"])]


def main() -> None:
    """Train it, and say how good it is."""
    parser = arguments()
    args = parser.parse_args()
    task = partial(train, root=args.data_root)
    for config in cli.carry_out(parser, args, build, task, record_rows, length="", keep=True):
        file = config.checkpoint(args.out)
        last = runs.read_log(file)["history"][-1]
        print(f"{file}: {last['test_accuracy']:.1f} % of {last['test_images']:,} test images")


if __name__ == "__main__":
    main()
