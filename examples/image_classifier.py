"""A small classifier, whose features `evaluate.py` can use instead of Inception's.

FID and its relatives are defined on the features of an Inception network that was trained on
ImageNet and must be downloaded. This script trains a small convolutional network on your images,
in minutes on one core, and prints how well it classifies the test images. Numbers from its features
rank generators. They cannot be compared with numbers from other features.

    python examples/image_classifier.py --data-root FOLDER      FOLDER/train/CLASS/*.png, /test/...
    python examples/image_classifier.py                         CIFAR-10, by torchvision
    python examples/evaluate.py FAKE REAL --features runs/image_classifier/checkpoints/FILE.pt
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lab import runs, study
from lab.data import image_folder
from lab.data.pixels import as_floats
from lab.metrics.features import Classifier, Extractor, fingerprint
from torch import Tensor

SHIFT = 4  # pixels at most, of an augmented image
WARM_UP = 0.2  # of the training


@dataclass(frozen=True)
class Config(study.OneModel):
    """A training: SGD with momentum and a learning rate that rises and falls linearly."""

    unroll_steps: ClassVar[int] = 0  # there is no game
    grows: ClassVar[str] = ""  # the rate falls to the end
    evaluate_every: ClassVar[int] = 1
    width: int = 24  # channels of the first layer
    epochs: int = 8  # passes over the training images
    batch_size: int = 128  # of every update
    peak_lr: float = 0.15  # the highest learning rate
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 5e-4  # of all parameters
    data: str = ""

    @property
    def label(self) -> str:
        return f"width{self.width}"


PRESETS = {"default": Config("default")}


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """Return a batch, half of it mirrored, all of it moved by up to 4 pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=rng, device=rng.device) < 0.5
    height, width = images.shape[2:]
    up, left = torch.randint(2 * SHIFT + 1, (2,), generator=rng, device=rng.device).tolist()
    padded = F.pad(torch.where(mirrored, images.flip(-1), images), [SHIFT] * 4, mode="reflect")
    return padded[:, :, up : up + height, left : left + width]


def train(config: Config, options: study.DataOptions, line: int) -> None:
    data, test = (image_folder.load(options.data_root, split=s) for s in image_folder.SPLITS)
    pixels, labels = (part.to(config.device) for part in (data.pixels, data.labels))
    torch.manual_seed(config.seed)
    rng = torch.Generator(config.device).manual_seed(config.seed)
    network = Classifier(len(data.classes), config.width).to(config.device)
    how = {"weight_decay": config.weight_decay, "nesterov": True}
    optimizer = torch.optim.SGD(network.parameters(), config.peak_lr, config.momentum, **how)

    def evaluate(_: int, __: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        found = Extractor("classifier", network.eval(), config.device)(test.pixels)
        right = found.logits.argmax(1) == test.labels
        network.train()
        return {
            "data": data.name,
            "train_images": len(data.labels),
            "test_images": len(test.labels),
            "test_accuracy": 100 * right.double().mean().item(),
            "weights": fingerprint(network),
        }, None

    parts = {"net": network, "sgd": optimizer}
    for epoch in runs.iterate(config, options, line, parts, rng, evaluate):
        batches = torch.randperm(len(labels), generator=rng, device=rng.device)
        batches = batches.split(config.batch_size)
        for step, chosen in enumerate(batches):
            done = (epoch - 1 + (step + 0.5) / len(batches)) / config.epochs
            rate = config.peak_lr * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
            optimizer.param_groups[0]["lr"] = rate
            images = augmented(as_floats(pixels[chosen]), rng)
            loss = F.cross_entropy(network(images)[1], labels[chosen])
            study.step(optimizer, loss)


def rows(record: str, config: Config, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    (row,) = study.last_rows(record, config, log)
    del row["preset"]
    return [row]


def report(results: study.Results) -> str:
    results.table("test_accuracy", "train_images", "test_images")
    return results.sentence("test_accuracy", "tells {} % of the test images right")


def arms(configs: Sequence[Config], options: study.DataOptions) -> list[Config]:
    data, test = (image_folder.load(options.data_root, split=s) for s in image_folder.SPLITS)
    if torch.equal(data.pixels, test.pixels):
        raise ValueError(
            f"--data-root must have test images apart, {options.data_root} has no folder test: "
            "put some of the images there, and the others in train"
        )
    name = f"{data.name}, {len(data.pixels):,} images"
    return [replace(config, data=name) for config in configs]


HOOKS = {"options": study.DataOptions(), "arms": arms, "rows": rows}
main = partial(study.main, __doc__, PRESETS, train, report, "image_classifier", {}, **HOOKS)
if __name__ == "__main__":
    main()
