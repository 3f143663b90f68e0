"""Networks whose features the image metrics compare: Inception, or any module.

A module takes images in [-1, 1] and returns features `(N, d)`, or a pair of features and logits:
the Inception Score needs logits.
"""

import hashlib
import importlib
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from lab.data.pixels import as_bytes, as_floats

RULE = (
    "--features must be inception, a checkpoint of image_classifier.py, or the name of a function "
    "that returns a module, as in package.module:name or file.py:name"
)


@dataclass(frozen=True)
class Embedding:
    """Images as an extractor sees them, in float64 on the CPU."""

    features: Tensor  # (N, d)
    logits: Tensor | None


@dataclass(frozen=True)
class Extractor:
    """A network in evaluation mode, and the name that records give it."""

    name: str
    network: Callable[[Tensor], Any]
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 250) -> Embedding:
        """Embed images of bytes, `(N, 3, height, width)`."""
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 2:
            found = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(
                f"images must be two or more, bytes of shape (N, 3, H, W), got {found}"
            )
        parts = [self._embed(batch.to(self.device)) for batch in images.split(batch_size)]
        features, logits = zip(*parts, strict=True)
        known = [part for part in logits if part is not None]
        return Embedding(torch.cat(features), torch.cat(known) if known else None)

    def _embed(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.network(as_floats(batch))
        features, logits = found if isinstance(found, tuple) else (found, None)
        if not isinstance(features, Tensor) or features.shape[:1] != batch.shape[:1]:
            raise TypeError(
                f"{self.name} must return features (N, d), or a pair of features and logits, for "
                f"images (N, 3, H, W), got {type(features).__name__} "
                f"{tuple(getattr(features, 'shape', ()))} for {len(batch)} images"
            )
        pair = features.flatten(1).double().cpu(), None if logits is None else logits.double().cpu()
        if not all(part is None or part.isfinite().all() for part in pair):
            raise ValueError(f"{self.name} returns numbers that are not finite")
        return pair


class Inception(nn.Module):
    """The Inception network of FID and IS, as torch-fidelity has converted it from TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        from torch_fidelity import FeatureExtractorInceptionV3  # slow to import

        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
        except URLError as error:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            raise RuntimeError(
                f"--features inception must fetch its weights, but the download failed: {error}. "
                f"Put the file of torch-fidelity's release into {folder}, or give another network: "
                "a classifier that image_classifier.py has trained"
            ) from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features and logits without their bias, as FID and IS are defined on."""
        features, logits = self.network(as_bytes(images))
        return features, logits


class Classifier(nn.Module):
    """A small convolutional classifier; its features are the averaged last layer."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width)
        blocks: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            blocks += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        last = channels[-1]
        blocks += [nn.Conv2d(last, last, 3, padding=1, bias=False), nn.BatchNorm2d(last), nn.ReLU()]
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classes = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.classes(features)


@cache
def load(name: str, device: str = "cpu") -> Extractor:
    """Return the extractor that `--features` names."""
    if name == "inception":
        return _ready("Inception (torch-fidelity)", Inception(), device)
    if Path(name).suffix == ".pt":
        return _classifier(Path(name), device)
    network = named(name, RULE)()
    if not isinstance(network, nn.Module):
        raise TypeError(f"{RULE}; {name}() returned {type(network).__name__}")
    return _ready(f"{Path(name).name} {fingerprint(network)}", network, device)


def named(name: str, rule: str) -> Any:
    """Return the object that `package.module:name` or `file.py:name` names."""
    source, _, attribute = name.rpartition(":")
    try:
        if source.endswith(".py"):
            return runpy.run_path(source)[attribute]
        return getattr(importlib.import_module(source), attribute)
    except (AttributeError, FileNotFoundError, KeyError, ModuleNotFoundError, ValueError) as error:
        raise ValueError(f"{rule}, got {name!r}: {error}") from error


def fingerprint(network: nn.Module) -> str:
    """Return a short hash of a network's weights: who compares numbers can compare it."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def _ready(name: str, network: nn.Module, device: str) -> Extractor:
    return Extractor(name, network.eval().requires_grad_(False).to(device), device)


def _classifier(path: Path, device: str) -> Extractor:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content["parts"]["net"]
        network = Classifier(len(weights["classes.weight"]), len(weights["features.0.weight"]))
        network.load_state_dict(weights)
        accuracy = content["log"]["history"][-1]["test_accuracy"]
    except FileNotFoundError as error:
        raise ValueError(f"{RULE}, got {path}, which does not exist") from error
    except Exception as error:  # torch.load raises whatever a damaged file leads to
        raise ValueError(f"{RULE}; {path} is not such a checkpoint: {error}") from error
    return _ready(f"classifier {accuracy:.1f} % {fingerprint(network)}", network, device)
