"""The digit classifier behind every metric on MNIST, and its file.

    network = classifier.load(args.classifier)
    labels = classifier.classify(network, images)    # (N,) of (N, 1, 28 or 32, ...) in [-1, 1]

`python examples/train_classifier.py` trains it. The file is found by `--classifier`, else in the
environment variable UNROLL_CLASSIFIER, else in the user's cache.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lab.data.digits import CLASSES
from lab.runs import digest, write_atomically

CACHE = Path.home() / ".cache" / "unroll" / "mnist_classifier.pt"
WIDTHS = 16, 32, 48
COMMAND = "python examples/train_classifier.py"


def network(widths: tuple[int, int, int] = WIDTHS) -> nn.Sequential:
    """Return an untrained classifier of `(N, 1, 28, 28)`: small, since it sees many samples."""
    layers: list[nn.Module] = []
    kernels = 5, 3, 3
    for inputs, outputs, kernel in zip((1, *widths), widths, kernels, strict=False):
        layers += [
            nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(widths[-1] * 16, CLASSES)
    )


@torch.no_grad()
def classify(network: nn.Module, images: Tensor, *, batch_size: int = 512) -> Tensor:
    """Return the digit in each image.

    Args:
        network: From `load`.
        images: `(N, 1, 28, 28)` in [-1, 1], or 32 a side, whose margin is cut off. Of RGB stacks
            `(N, 3, ...)`, which channel has which digit: the labels are then `(N, 3)`.
        batch_size: Digits at a time.
    """
    if images.ndim != 4 or images.shape[1] not in {1, 3} or images.shape[-1] not in {28, 32}:
        shape = tuple(images.shape)
        raise ValueError(f"images must be (N, 1 or 3, 28 or 32, 28 or 32), got {shape}")
    least, most = images.min().item(), images.max().item()
    if not -1 <= least <= most <= 1:  # of NaNs too
        raise ValueError(f"images must be in [-1, 1], got from {least:.3g} to {most:.3g}")
    margin = (images.shape[-1] - 28) // 2
    inner = images[..., margin : margin + 28, margin : margin + 28]
    digits = inner.flatten(0, 1).unsqueeze(1)
    labels = torch.cat([network(part).argmax(1) for part in digits.split(batch_size)])
    return labels if images.shape[1] == 1 else labels.view(-1, 3)


def save(path: Path, trained: nn.Module, facts: dict[str, Any]) -> str:
    """Write a trained classifier with what is known of it, and return its hash."""
    states = trained.state_dict()
    content = {"states": states, "facts": facts, "hash": digest(states)}
    write_atomically(path, lambda draft: torch.save(content, draft))
    return content["hash"]


def load(path: Path | None = None, device: str | torch.device = "cpu") -> nn.Sequential:
    """Return the trained classifier, BatchNorm folded into the convolutions; `facts` is its story.

    Args:
        path: Its file.
        device: Where it is to be.
    """
    path = found(path)
    if not path.exists():
        raise FileNotFoundError(
            f"--classifier must be a trained classifier, there is no {path}: run {COMMAND}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        states, facts, expected = (content[key] for key in ("states", "facts", "hash"))
        if digest(states) != expected:
            raise ValueError("its weights are not those that its hash was made of")
        trained = network(tuple(facts["widths"]))
        trained.load_state_dict(states)
    except Exception as error:  # pickle, zip and torch have one each
        raise RuntimeError(
            f"--classifier {path} cannot be read ({error}): delete it and run {COMMAND}"
        ) from error
    folded: list[nn.Module] = []
    for layer in trained.eval():
        if isinstance(layer, nn.BatchNorm2d):
            folded[-1] = fuse_conv_bn_eval(folded[-1], layer)
        else:
            folded.append(layer)
    return nn.Sequential(*folded).requires_grad_(False).eval().to(device)


def facts(path: Path | None = None) -> dict[str, Any]:
    """Return what is known of the classifier in a file: test accuracy, hash, how it was trained."""
    content = torch.load(found(path), map_location="cpu", weights_only=True)
    known: dict[str, Any] = content["facts"]
    return known | {"hash": content["hash"]}


def found(path: Path | None = None) -> Path:
    """Return where the classifier is looked for."""
    return path or Path(os.environ.get("UNROLL_CLASSIFIER") or CACHE)


def add_classifier_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says where the classifier is."""
    parser.add_argument(
        "--classifier",
        type=Path,
        metavar="FILE",
        help="the digit classifier behind the metrics, which train_classifier.py makes (default: "
        f"the environment variable UNROLL_CLASSIFIER, else {CACHE.relative_to(Path.home())} in "
        "the home folder)",
    )
