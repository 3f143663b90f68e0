"""The digit classifier of the metrics on MNIST, and its file.

    network = classifier.load(args.classifier)
    labels = classifier.classify(network, images)    # (N,) of (N, 1, 28 or 32, ...) in [-1, 1]

It plays the part of the "pre-trained MNIST classifier" of section 3.3.1 of
https://arxiv.org/abs/1611.02163, which the paper does not describe. Its file is named by
`--classifier`, otherwise by the environment variable UNROLL_CLASSIFIER, and is otherwise in the
user's cache. If there is no file, the classifier is trained once.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import trange

from lab import study
from lab.data import digits
from lab.data.pixels import as_floats
from lab.runs import digest, provenance, write_atomically

CACHE = Path.home() / ".cache" / "unroll" / "mnist_classifier.pt"
WIDTHS = 16, 32, 48
REFERENCES = 1000  # real digits or stacks that precision is about; samples beyond that are left out
ENOUGH = 99.3  # percent of the test digits that it must tell
EPOCHS = 20
RATE = 4e-3  # the highest of one cycle
TURN, SCALE, SHIFT = 10.0, 0.1, 2.0  # how digits are deformed: degrees, a part, pixels


@dataclass(frozen=True)
class Options(study.DataOptions):
    """The files of the experiments on MNIST, and the runs."""

    classifier: Path | None = None  # tells digits apart; else $UNROLL_CLASSIFIER, else trained once


def prepared(options: Options) -> dict[str, Any]:
    """Read the data, train the classifier if there is none, and return its hash and accuracy."""
    digits.mnist(options.data_root)
    if not found(options.classifier).exists():
        if options.classifier is not None:
            raise FileNotFoundError(
                f"--classifier must be a trained classifier, there is no {options.classifier}: "
                "leave it out to train one"
            )
        train(found(), options.data_root)
    load(options.classifier)
    return facts(options.classifier)


def network() -> nn.Sequential:
    """Return an untrained classifier of `(N, 1, 28, 28)`: small, since it sees many samples."""
    layers: list[nn.Module] = []
    kernels = 5, 3, 3
    for inputs, outputs, kernel in zip((1, *WIDTHS), WIDTHS, kernels, strict=False):
        layers += [
            nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(WIDTHS[-1] * 16, digits.CLASSES)
    )


@torch.no_grad()
def classify(network: nn.Module, images: Tensor, *, batch_size: int = 512) -> Tensor:
    """Return the digit in each image."""
    labels = torch.cat([network(part).argmax(1) for part in _single(images).split(batch_size)])
    return labels if images.shape[1] == 1 else labels.view(-1, 3)


@torch.no_grad()
def precision(network: nn.Sequential, images: Tensor, real: Tensor) -> float:
    """Return the share of digits that are as near to real ones as these are to each other.

    Improved precision (Kynkäänniemi et al. 2019, 3 neighbours) of the last layer's inputs. The
    classifier's certainty is no usable metric: it is certain that white noise is an 8.
    """
    from torch_fidelity import metric_prc  # slow to import

    features = [network[:-1](_single(batch[:REFERENCES])) for batch in (images, real)]
    found = metric_prc.prc_features_to_metric(*features, save_cpu_ram=True, verbose=False)
    return float(found["precision"])


def _single(images: Tensor) -> Tensor:
    """Return single digits, `(N, 1, 28, 28)`, of images or of stacks of three."""
    if images.ndim != 4 or images.shape[1] not in {1, 3} or images.shape[-1] not in {28, 32}:
        shape = tuple(images.shape)
        raise ValueError(f"images must be (N, 1 or 3, 28 or 32, 28 or 32), got {shape}")
    least, most = images.min().item(), images.max().item()
    if not -1 <= least <= most <= 1:  # of NaNs too
        raise ValueError(f"images must be in [-1, 1], got from {least:.3g} to {most:.3g}")
    margin = (images.shape[-1] - 28) // 2
    inner = images[..., margin : margin + 28, margin : margin + 28]
    return inner.flatten(0, 1).unsqueeze(1)


def train(
    path: Path, root: Path | None = None, *, epochs: int = EPOCHS, enough: float = ENOUGH
) -> str:
    """Train a classifier, keep it in a file if it is good enough, and return its hash.

    The digits are turned, scaled and shifted by chance. It takes about four minutes on one core.
    """
    torch.manual_seed(0)  # weights and dropout
    rng = torch.Generator().manual_seed(0)
    data, test = digits.mnist(root), digits.mnist(root, train=False)
    trained = network()
    optimizer = torch.optim.AdamW(trained.parameters(), RATE, weight_decay=1e-2)
    steps = math.ceil(len(data) / 128)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
    for epoch in trange(1, epochs + 1, desc="classifier of digits, once", unit="epoch"):
        torch.manual_seed(epoch)
        for index in torch.randperm(len(data), generator=rng).split(128):
            logits = trained(deformed(data.at(index), rng))
            loss = functional.cross_entropy(logits, data.labels[index], label_smoothing=0.05)
            study.step(optimizer, loss)
            cycle.step()
    right = classify(trained.eval(), as_floats(test.images)) == test.labels
    accuracy = round(100 * right.float().mean().item(), 2)
    if accuracy < enough:
        raise RuntimeError(f"{accuracy} % of the test digits are right, not {enough}")
    return save(path, trained, {"epochs": epochs, "test_accuracy": accuracy} | provenance())


def deformed(images: Tensor, rng: torch.Generator) -> Tensor:
    """Return every image turned, scaled and shifted by chance."""
    turn, scale, x, y = 2 * torch.rand(4, len(images), generator=rng) - 1
    angle, factor = turn * TURN * math.pi / 180, 1 + scale * SCALE
    cos, sin = factor * angle.cos(), factor * angle.sin()
    pixels = 2 * SHIFT / images.shape[-1]
    affine = torch.stack([cos, -sin, pixels * x, sin, cos, pixels * y], 1).view(-1, 2, 3)
    where = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, where, padding_mode="border", align_corners=False)


def save(path: Path, trained: nn.Module, facts: dict[str, Any]) -> str:
    """Write a trained classifier with facts about it, and return its hash."""
    states = trained.state_dict()
    content = {"states": states, "facts": facts, "hash": digest(states)}
    write_atomically(path, lambda draft: torch.save(content, draft))
    return content["hash"]


def load(path: Path | None = None, device: str | torch.device = "cpu") -> nn.Sequential:
    """Return the trained classifier, with BatchNorm folded into the convolutions."""
    path = found(path)
    if not path.exists():
        raise FileNotFoundError(f"--classifier must be a trained classifier, there is no {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if digest(content["states"]) != content["hash"]:
            raise ValueError("its weights are not those that its hash was made of")
        trained = network()
        trained.load_state_dict(content["states"])
    except Exception as error:  # pickle, zip and torch have one each
        raise RuntimeError(
            f"--classifier {path} cannot be read ({error}): delete it, and it is trained again"
        ) from error
    folded: list[nn.Module] = []
    for layer in trained.eval():
        if isinstance(layer, nn.BatchNorm2d):
            folded[-1] = fuse_conv_bn_eval(folded[-1], layer)
        else:
            folded.append(layer)
    return nn.Sequential(*folded).requires_grad_(False).eval().to(device)


def facts(path: Path | None = None) -> dict[str, Any]:
    """Return the facts about the classifier in a file, for the settings of an experiment."""
    content = torch.load(found(path), map_location="cpu", weights_only=True)
    accuracy = content["facts"]["test_accuracy"]
    return {"classifier": content["hash"], "classifier_accuracy": accuracy}


def found(path: Path | None = None) -> Path:
    """Return where the classifier is looked for."""
    return path or Path(os.environ.get("UNROLL_CLASSIFIER") or CACHE)
