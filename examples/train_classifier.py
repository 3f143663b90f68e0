"""Train the digit classifier behind the metrics on MNIST, to at least 99.3 % test accuracy.

The "pre-trained MNIST classifier" of section 3.3.1 of https://arxiv.org/abs/1611.02163, which the
paper does not describe: three strided convolutions, on digits turned, scaled and shifted a little.
It is trained once and kept in the user's cache, with its accuracy and a hash of its weights.

    python examples/train_classifier.py                   about four minutes on one core
    python examples/train_classifier.py --out FOLDER --resume
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lab import cli, runs
from lab.data import digits
from lab.data.pixels import as_floats
from lab.metrics import classifier
from torch import Tensor, nn
from torch.nn import functional

ENOUGH = 99.3  # percent of the test digits
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Config:
    """How the classifier is trained; all ours."""

    widths: tuple[int, ...] = classifier.WIDTHS
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 4e-3  # the highest of one cycle
    weight_decay: float = 1e-2
    turn: float = 10.0  # degrees, either way
    scale: float = 0.1
    shift: float = 2.0  # pixels
    seed: int = 0


def deformed(images: Tensor, config: Config, rng: torch.Generator) -> Tensor:
    """Return every image turned, scaled and shifted by chance."""
    turn, scale, x, y = 2 * torch.rand(4, len(images), generator=rng) - 1
    angle, factor = turn * config.turn * math.pi / 180, 1 + scale * config.scale
    cos, sin = factor * angle.cos(), factor * angle.sin()
    pixels = 2 * config.shift / images.shape[-1]
    affine = torch.stack([cos, -sin, pixels * x, sin, cos, pixels * y], 1).view(-1, 2, 3)
    where = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, where, padding_mode="border", align_corners=False)


def train(config: Config, root: Path | None, folder: Path, *, resume: bool) -> nn.Module:
    """Return the trained classifier; its accuracy over the epochs is in its checkpoint."""
    torch.set_num_threads(1)  # the network is tiny
    torch.manual_seed(config.seed)  # weights and dropout
    rng = torch.Generator().manual_seed(config.seed)
    data, test = digits.mnist(root), digits.mnist(root, train=False)
    network = classifier.network(config.widths)
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    steps = math.ceil(len(data) / config.batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.epochs * steps
    )

    def evaluate(_: int, __: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], None]:
        network.eval()
        labels = classifier.classify(network, as_floats(test.images))
        network.train()
        right = (labels == test.labels).float().mean().item()
        return {"test_accuracy": round(100 * right, 2)}, None

    epochs = runs.iterate(
        folder / CHECKPOINT,
        settings(config),
        {"network": network, "optimizer": optimizer, "cycle": cycle},
        rng,
        evaluate,
        length=config.epochs,
        every=1,
        resume=resume,
        bar={"desc": "classifier", "unit": "epoch"},
        counts="epochs",
    )
    for epoch in epochs:
        torch.manual_seed(config.seed + epoch)  # dropout, after an interruption too
        order = torch.randperm(len(data), generator=rng)
        for index in order.split(config.batch_size):
            logits = network(deformed(data.at(index), config, rng))
            loss = functional.cross_entropy(logits, data.labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return network


def settings(config: Config) -> dict[str, Any]:
    """Return what a checkpoint is known by."""
    return {name: value for name, value in asdict(config).items() if name != "widths"}


def main() -> None:
    """Train what the command line asks for, and keep it if it is good enough."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--epochs", type=cli.positive, default=Config.epochs, metavar="N", help="default: 20")
    add("--seed", type=int, default=0, help="default: 0")
    add(
        "--out",
        type=Path,
        default=Path("runs", "classifier"),
        metavar="FOLDER",
        help="where the checkpoint of the training is written (default: %(default)s)",
    )
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    digits.add_data_flag(parser)
    classifier.add_classifier_flag(parser)
    args = parser.parse_args()
    config = Config(epochs=args.epochs, seed=args.seed)
    path = classifier.found(args.classifier)
    try:
        if path.exists():
            raise FileExistsError(f"--classifier {path} is there already: delete it first")
        if (checkpoint := args.out / CHECKPOINT).exists():
            if not args.resume:
                raise FileExistsError(
                    f"--out must not hold a training already, there is {checkpoint}: continue it "
                    "with --resume, or give another folder"
                )
            runs.check(checkpoint, settings(config), length="")
        network = train(config, args.data_root, args.out, resume=args.resume)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))

    log = runs.read_log(args.out / CHECKPOINT)
    accuracy = log["history"][-1]["test_accuracy"]
    if accuracy < ENOUGH:
        sys.exit(
            f"{accuracy} % of the test digits are right, not {ENOUGH}: give it more --epochs, in "
            "another --out"
        )
    facts = {**asdict(config), "widths": list(config.widths), "test_accuracy": accuracy}
    digest = classifier.save(path, network, facts | log["provenance"])
    print(f"{accuracy} % of the test digits are right; {path}, hash {digest}")


if __name__ == "__main__":
    main()
