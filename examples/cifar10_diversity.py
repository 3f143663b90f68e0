"""Two measures of diversity, on the checkpoints of `cifar10.py`.

Section 3.4 of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative Adversarial Networks"
(ICLR 2017, https://arxiv.org/abs/1611.02163). The claims: with more look-ahead steps,

    3.4.1  G reconstructs training images better, by L-BFGS on its input (Table 3, Fig. 5, App. G)
    3.4.2  the distances of random pairs of samples are more like those of the data (Fig. 6)

    python examples/cifar10_diversity.py                    on what cifar10.py wrote
    python examples/cifar10_diversity.py --targets 1280 --steps 200     as in the paper
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cifar10
import torch
import tyro
from lab import records, runs, study
from lab.data import image_folder
from lab.data.pixels import as_bytes
from lab.figures import diversity
from lab.metrics import distances, inversion
from tqdm import tqdm

FACTS = "preset", "data", "images", "size", "pairs", "batch_size", "unroll_steps", "seed"
OWN = {"unroll_steps", "seed"}  # in what the models that are compared differ


@dataclass(frozen=True)
class Config:
    """What is measured. The starts, the images and the pairs are the same for every model."""

    targets: int = 256  # training images that are reconstructed; 1,280 in the paper
    starts: int = 3  # for each of them, from N(0, I); the best counts
    steps: int = 30  # of L-BFGS at most (ours)
    samples: int = 2000  # of which pairs are made (ours)
    distances: int = 10_000  # pairs (ours)
    draw: int = 0  # the seed of all of these


@dataclass(frozen=True)
class Options(Config):
    """What is measured, on which models, and what is kept."""

    data_root: Path | None = None  # as for cifar10.py
    device: str = "cpu"
    checkpoints: Path = Path("runs/cifar10/checkpoints")  # of the models
    out: Path = Path("runs/cifar10_diversity")  # what was measured; the same command continues
    record: bool = False  # append to cifar10_inversion.csv and cifar10_distances.csv
    records: Path = records.RESULTS  # the folder of the records
    figures: Path | None = None  # the folder of the figures, if not that of --out

    @property
    def config(self) -> Config:
        """Return what is measured alone."""
        return Config(**{field.name: getattr(self, field.name) for field in fields(Config)})


def models(folder: Path) -> dict[Path, cifar10.Config]:
    """Return the finished models of a folder, by seed and K; they may differ in nothing else."""
    found = {}
    for path in sorted(folder.glob("*-seed*.pt")):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            config = cifar10.Config(**content["settings"])
        except Exception as error:  # pickle, zip and torch have one each
            message = f"{path} cannot be read ({error}): delete and train it again"
            raise ValueError(message) from error
        done = content["log"]["history"][-1]["pairs"]
        if done < config.pairs or "since" in content["log"]:
            raise ValueError(
                f"{path} must be finished, it is at pair {done} of {config.pairs}: continue it "
                "with cifar10.py --resume"
            )
        found[path] = config
    if not found:
        raise ValueError(f"--checkpoints must be a folder of cifar10.py's, {folder} has none")
    alike = {str({k: v for k, v in asdict(c).items() if k not in OWN}) for c in found.values()}
    if len(alike) > 1:
        raise ValueError(f"the models of {folder} must differ in K and seed alone: {alike}")
    return dict(sorted(found.items(), key=lambda item: (item[1].seed, item[1].unroll_steps)))


@dataclass(frozen=True)
class Setting:
    """What every model is measured on."""

    config: Config
    data: image_folder.Images
    device: str

    def __post_init__(self) -> None:
        """Draw the images that are reconstructed, and the distances in the data."""
        if self.config.targets > len(self.data.pixels):
            most = len(self.data.pixels)
            raise ValueError(f"--targets must be at most {most}, got {self.config.targets}")
        rng = torch.Generator().manual_seed(self.config.draw)
        chosen = torch.randperm(len(self.data.pixels), generator=rng)[: self.config.targets]
        real = distances.pairwise(self.data.pixels, self.config.distances, rng)
        object.__setattr__(self, "chosen", chosen)
        object.__setattr__(self, "real", real)


def measure(path: Path, where: Setting, folder: Path) -> dict[str, Any]:
    """Return what is measured on one model, kept in a file: done once."""
    g, model = cifar10.trained(path, where.device)
    config = where.config
    settings = {**asdict(config), "model": asdict(model)}
    kept = folder / f"{path.stem}.pt"
    if kept.exists():
        runs.check(kept, settings, length="")
        found: dict[str, Any] = torch.load(kept, weights_only=True)["result"]
        return found
    rng = torch.Generator().manual_seed(config.draw + 1)
    starts = torch.randn(config.targets, config.starts, model.noise_size, generator=rng)
    targets = image_folder.batch(where.data.pixels, where.chosen).to(where.device)
    images, errors = inversion.reconstruct(g, targets, starts, steps=config.steps)
    rng = torch.Generator().manual_seed(config.draw + 3)  # whatever the starts are
    samples = cifar10.generated(g, torch.randn(config.samples, model.noise_size, generator=rng))
    result = {
        "images": as_bytes(images),
        "mse": errors,
        "distances": distances.pairwise(samples, config.distances, rng),
        "provenance": runs.provenance(),
    }
    content = {"settings": settings, "result": result}
    runs.write_atomically(kept, lambda draft: torch.save(content, draft))
    return result


def record(folder: Path, where: Setting, model: cifar10.Config, result: Mapping[str, Any]) -> None:
    """Append a row an image to one record, and the histogram in numbers to the other."""
    facts = {name: getattr(model, name) for name in FACTS}
    facts |= {"device": where.device, **result["provenance"]}
    how = asdict(where.config)
    rng = torch.Generator().manual_seed(where.config.draw + 2)
    other = distances.pairwise(where.data.pixels, where.config.distances, rng)
    own, real = result["distances"], where.real
    numbers = {
        "median": own.median().item(),
        "median_data": real.median().item(),
        "wasserstein": distances.wasserstein(own, real),
        "wasserstein_data": distances.wasserstein(other, real),  # what equals would have
    }
    pairs = zip(where.chosen.tolist(), result["mse"].tolist(), strict=True)
    inverted = [{"image": image, "mse": f"{mse:.6g}"} for image, mse in pairs]
    distant = [{name: f"{number:.6g}" for name, number in numbers.items()}]
    for name, rows, setting in (
        ("inversion", inverted, ("targets", "starts", "steps", "draw")),
        ("distances", distant, ("samples", "distances", "draw")),
    ):
        first = {"experiment": f"cifar10_{name}", **facts, **{n: how[n] for n in setting}}
        for row in rows:
            key = [*first, *({"image"} & row.keys())]
            records.append(folder / f"cifar10_{name}.csv", first | row, key=key)


def report(folder: Path, where: Setting, found: Mapping[Path, tuple[cifar10.Config, Any]]) -> None:
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
        print(f"K = {k}, seed {seed}: MSE {result['mse'].mean():.4f}, W1 to the data {w:.3f}")
    print("MSE: of reconstructions, in [-1, 1]; W1: of the distances of pairs, to the data's.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, record and draw."""
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, description=__doc__, args=arguments, config=config)
    torch.set_num_threads(1)
    found = {}
    try:
        trained = models(options.checkpoints)
        data = image_folder.load(options.data_root)
        where = Setting(options.config, data, options.device)
        for path, model in trained.items():
            if (model.data, model.images) != (data.name, len(data.pixels)):
                raise ValueError(
                    f"--data-root must be what {path} was trained on, {model.images} images of "
                    f"{model.data}, it has {len(data.pixels)} of {data.name}"
                )
        study.check_writable("--out", options.out)
        for path, model in tqdm(trained.items(), unit="model"):
            found[path] = model, measure(path, where, options.out)
            if options.record:
                record(options.records, where, *found[path])
    except (OSError, ValueError) as error:
        study.refuse(error)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the same command continues.")
    report(options.figures or options.out, where, found)


if __name__ == "__main__":
    main()
