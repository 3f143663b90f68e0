"""Two measures of diversity, on the checkpoints of `cifar10.py`.

Section 3.4 of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative Adversarial Networks"
(ICLR 2017, https://arxiv.org/abs/1611.02163). The claims: with more look-ahead steps,

    3.4.1  G reconstructs training images better, by L-BFGS on its input (Table 3, Fig. 5, App. G)
    3.4.2  the distances of random pairs of samples are more like those of the data (Fig. 6)

    python examples/cifar10_diversity.py                    on what cifar10.py wrote
    python examples/cifar10_diversity.py --preset paper     1,280 images
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cifar10
import torch
from lab import cli, records, runs
from lab.data import image_folder
from lab.data.pixels import as_bytes
from lab.figures import diversity
from lab.metrics import distances, inversion
from torch import Tensor
from tqdm import tqdm

OWN = ("unroll_steps", "seed")  # in what the models that are compared differ


@dataclass(frozen=True)
class Config:
    """What is measured. The starts, the images and the pairs are the same for every model."""

    targets: int = 1280  # training images that are reconstructed
    starts: int = 3  # for each of them, from N(0, I); the best counts
    steps: int = 200  # of L-BFGS at most (ours)
    samples: int = 5000  # of which pairs are made (ours)
    distances: int = 50_000  # pairs (ours)
    draw: int = 0  # the seed of all of these


PRESETS = {
    "small": Config(targets=256, steps=30, samples=2000, distances=10_000),
    "paper": Config(),
}


@dataclass(frozen=True)
class Setting:
    """What every model is measured on."""

    config: Config
    data: image_folder.Images
    chosen: Tensor  # which images are reconstructed
    real: Tensor  # distances in the data
    device: str

    @property
    def targets(self) -> Tensor:
        """Return the images that are reconstructed, in [-1, 1]."""
        return image_folder.batch(self.data.pixels, self.chosen)


def setting(config: Config, data: image_folder.Images, device: str) -> Setting:
    """Draw the images and the pairs that every model is compared on."""
    if config.targets > len(data.pixels):
        raise ValueError(f"--targets must be at most {len(data.pixels)}, got {config.targets}")
    rng = torch.Generator().manual_seed(config.draw)
    chosen = torch.randperm(len(data.pixels), generator=rng)[: config.targets]
    real = distances.pairwise(data.pixels, config.distances, rng)
    return Setting(config, data, chosen, real, device)


def measure(path: Path, where: Setting, folder: Path) -> dict[str, Any]:
    """Return what is measured on one model, kept in a file beside: done once."""
    g, model = cifar10.trained(path, where.device)
    settings = {**asdict(where.config), "model": asdict(model)}
    kept = folder / f"{path.stem}.pt"
    if kept.exists():
        runs.check(kept, settings, length="")
        found: dict[str, Any] = torch.load(kept, weights_only=True)["result"]
        return found
    rng = torch.Generator().manual_seed(where.config.draw + 1)
    shape = where.config.targets, where.config.starts, model.noise_size
    starts = torch.randn(shape, generator=rng)
    targets = where.targets.to(where.device)
    images, errors = inversion.reconstruct(g, targets, starts, steps=where.config.steps)
    rng = torch.Generator().manual_seed(where.config.draw + 3)  # whatever the starts are
    noise = torch.randn(where.config.samples, model.noise_size, generator=rng)
    samples = cifar10.generated(g, noise)
    result = {
        "images": as_bytes(images),
        "mse": errors,
        "distances": distances.pairwise(samples, where.config.distances, rng),
        "provenance": runs.provenance(),
    }
    content = {"settings": settings, "result": result}
    runs.write_atomically(kept, lambda draft: torch.save(content, draft))
    return result


def opened(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have one each
        raise ValueError(f"{path} cannot be read ({error}): delete and train it again") from error
    return content


def models(folder: Path) -> dict[Path, cifar10.Config]:
    """Return the finished models of a folder, by seed and K; they may differ in nothing else."""
    paths = sorted(folder.glob("K*-seed*.pt"))
    if not paths:
        raise ValueError(f"--checkpoints must be a folder of cifar10.py's, {folder} has none of K*")
    found = {}
    for path in paths:
        content = opened(path)
        config = cifar10.Config(**content["settings"])
        done = content["log"]["history"][-1]["pairs"]
        if done < config.pairs or "since" in content["log"]:
            raise ValueError(
                f"{path} must be finished, it is at pair {done} of {config.pairs}: continue it "
                "with cifar10.py --resume"
            )
        found[path] = config
    alike = {str({k: v for k, v in asdict(c).items() if k not in OWN}) for c in found.values()}
    if len(alike) > 1:
        raise ValueError(f"the models of {folder} must differ in K and seed alone: {alike}")
    return dict(sorted(found.items(), key=lambda item: (item[1].seed, item[1].unroll_steps)))


def common(where: Setting, model: cifar10.Config, provenance: dict[str, str]) -> dict[str, Any]:
    """Return the first columns of both records."""
    names = ("preset", "data", "images", "size", "pairs", "batch_size", "unroll_steps", "seed")
    row = {name: getattr(model, name) for name in names}
    return row | {"device": where.device, **provenance}


def inversion_rows(
    where: Setting, model: cifar10.Config, result: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the best error of every image, on the scale of [-1, 1]."""
    first = {"experiment": "cifar10_inversion", **common(where, model, result["provenance"])}
    how = {name: getattr(where.config, name) for name in ("targets", "starts", "steps", "draw")}
    pairs = zip(where.chosen.tolist(), result["mse"].tolist(), strict=True)
    return [first | how | {"image": image, "mse": f"{mse:.6g}"} for image, mse in pairs]


def distance_rows(
    where: Setting, model: cifar10.Config, result: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the histogram of a model in numbers, beside the data's."""
    rng = torch.Generator().manual_seed(where.config.draw + 2)
    other = distances.pairwise(where.data.pixels, where.config.distances, rng)
    own, real = result["distances"], where.real
    row = {"experiment": "cifar10_distances", **common(where, model, result["provenance"])}
    row |= {name: getattr(where.config, name) for name in ("samples", "distances", "draw")}
    numbers = {
        "median": own.median().item(),
        "median_data": real.median().item(),
        "wasserstein": distances.wasserstein(own, real),
        "wasserstein_data": distances.wasserstein(other, real),  # what equals would have
    }
    return [row | {name: f"{number:.6g}" for name, number in numbers.items()}]


def record(folder: Path, where: Setting, model: cifar10.Config, result: dict[str, Any]) -> None:
    """Append what is new to the two records."""
    for name, rows in (("inversion", inversion_rows), ("distances", distance_rows)):
        for row in rows(where, model, result):
            key = [column for column in row if column not in ("mse", "wasserstein_data")]
            records.append(folder / f"cifar10_{name}.csv", row, key=key)


def report(folder: Path, where: Setting, found: dict[Path, tuple[cifar10.Config, Any]]) -> None:
    """Draw Fig. 5, App. G's pages and Fig. 6."""
    results = {(model.unroll_steps, model.seed): result for model, result in found.values()}
    targets = where.data.pixels[where.chosen]
    for seed in sorted({seed for _, seed in results}):
        of_seed = {k: result for (k, own), result in results.items() if own == seed}
        diversity.reconstructions(folder, seed, targets, of_seed)
    own = {key: result["distances"] for key, result in results.items()}
    diversity.distances(folder, where.real, own)
    for (k, seed), result in results.items():
        w = distances.wasserstein(result["distances"], where.real)
        print(f"K={k} seed {seed}: MSE {result['mse'].mean():.4f}, W1 to the data {w:.3f}")


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="how much is measured (default: small)")
    add("--targets", type=cli.positive, metavar="N", help="images that are reconstructed")
    add("--starts", type=cli.positive, metavar="N", help="for each image, the best counts")
    add("--steps", type=cli.positive, metavar="N", help="of L-BFGS at most")
    add("--samples", type=cli.positive, metavar="N", help="of which pairs are made")
    add("--distances", type=cli.positive, metavar="N", help="pairs")
    add("--data-root", type=Path, metavar="FOLDER", help="as for cifar10.py")
    add("--device", default="cpu", help="default: cpu")
    add(
        "--checkpoints",
        type=Path,
        default=Path("runs/cifar10/checkpoints"),
        metavar="FOLDER",
        help="of the models (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/cifar10_diversity"),
        metavar="FOLDER",
        help="what was measured is kept there, the same command continues (default: %(default)s)",
    )
    add(
        "--record",
        type=Path,
        nargs="?",
        const=records.RESULTS,
        metavar="FOLDER",
        help="append to cifar10_inversion.csv and cifar10_distances.csv in FOLDER (docs/results)",
    )
    add(
        "--figures",
        type=Path,
        nargs="?",
        const=records.RESULTS.parent / "figures",
        metavar="FOLDER",
        help="where figures go (default: --out; without FOLDER: docs/figures)",
    )
    return parser  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    """Measure, record and draw."""
    parser = arguments()
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    known = {n: v for n, v in vars(args).items() if n in Config.__match_args__ and v is not None}
    found = {}
    try:
        trained = models(args.checkpoints)
        data = image_folder.load(args.data_root)
        where = setting(replace(PRESETS[args.preset], **known), data, args.device)
        for path, model in trained.items():
            if (model.data, model.images) != (data.name, len(data.pixels)):
                raise ValueError(
                    f"--data-root must be what {path} was trained on, {model.images} images of "
                    f"{model.data}, it has {len(data.pixels)} of {data.name}"
                )
        cli.check_writable("--out", args.out)
        for path, model in tqdm(trained.items(), unit="model"):
            found[path] = model, measure(path, where, args.out)
            if args.record is not None:
                record(args.record, where, *found[path])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted: the same command continues.") from None
    report(args.figures or args.out, where, found)


if __name__ == "__main__":
    main()
