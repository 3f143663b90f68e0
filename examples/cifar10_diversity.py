"""Two measures of diversity, on the checkpoints of `cifar10.py`.

Section 3.4 of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative Adversarial Networks"
(ICLR 2017, https://arxiv.org/abs/1611.02163). The claims: with more look-ahead steps,

    3.4.1  G reconstructs training images better, by L-BFGS on its input (Table 3, Fig. 5, App. G)
    3.4.2  the distances of random pairs of samples are more like those of the data (Fig. 6)

    python examples/cifar10_diversity.py                    on what cifar10.py wrote
    python examples/cifar10_diversity.py --targets 1280 --steps 200     the images of the paper
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cifar10
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from lab import columns, records, runs
from lab.data import image_folder
from lab.data.pixels import as_bytes, as_floats
from lab.figures import images, plots
from lab.metrics import inversion
from scipy.stats import wasserstein_distance
from torch import Tensor
from tqdm import tqdm

FACTS = "preset", "data", "images", "size", "pairs", "batch_size", "unroll_steps", "seed"
OWN = {"unroll_steps", "seed"}  # in what the models that are compared differ
INVERSION = "targets", "starts", "steps", "draw"  # what these depend on
DISTANCES = "samples", "distances", "draw"
ROWS, BLOCKS = 8, 3  # images below each other as in Fig. 5, and its layout as often as in App. G


@dataclass(frozen=True)
class Config:
    """What is measured. The starts, the images and the pairs are the same for every model."""

    targets: int = 256  # training images that are reconstructed; 1,280 in the paper
    starts: int = 3  # for each of them, from N(0, I); the best counts
    steps: int = 30  # of L-BFGS at most (ours)
    samples: int = 2000  # of which pairs are made (ours)
    distances: int = 10_000  # pairs (ours)
    draw: Annotated[int, tyro.conf.arg(name="seed")] = 0  # of all of these
    data_root: Path | None = None  # as for cifar10.py
    device: str = "cpu"
    checkpoints: Path = Path("runs/cifar10/checkpoints")  # of the models
    out: Path = Path("runs/cifar10_diversity")  # what was measured; the same command continues
    record: bool = False  # append to cifar10_inversion.csv and cifar10_distances.csv
    records: Path = records.RESULTS  # the folder of the records
    figures: Path | None = None  # the folder of the figures, if not that of --out


class Setting(NamedTuple):
    """What every model is measured on."""

    config: Config
    data: image_folder.Images
    chosen: Tensor  # the images that are reconstructed
    real: Tensor  # distances in the data


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


def setting(config: Config) -> Setting:
    """Draw the images that are reconstructed, and the distances in the data."""
    data = image_folder.load(config.data_root)
    if config.targets > len(data.pixels):
        raise ValueError(f"--targets must be at most {len(data.pixels)}, got {config.targets}")
    rng = torch.Generator().manual_seed(config.draw)
    chosen = torch.randperm(len(data.pixels), generator=rng)[: config.targets]
    return Setting(config, data, chosen, pairwise(data.pixels, config.distances, rng))


def pairwise(images: Tensor, pairs: int, rng: torch.Generator, *, batch_size: int = 1000) -> Tensor:
    """Return the l2 distances of random pairs of different images."""
    if len(images) < 2:
        raise ValueError(f"images must be two or more, got {len(images)}")
    first = torch.randint(len(images), (pairs,), generator=rng)
    second = (first + torch.randint(1, len(images), (pairs,), generator=rng)) % len(images)
    scale = 127.5 if images.dtype == torch.uint8 else 1.0
    parts = [
        (images[i].float() - images[j].float()).flatten(1).norm(dim=1).cpu() / scale
        for i, j in zip(first.split(batch_size), second.split(batch_size), strict=True)
    ]
    return torch.cat(parts)


def measure(path: Path, where: Setting) -> dict[str, Any]:
    """Return the measurements of one model; a file keeps them, so they are made only once."""
    config = where.config
    g, model = cifar10.trained(path, config.device)
    how = {name: getattr(config, name) for name in (*INVERSION, *DISTANCES)}
    settings = {**how, "model": asdict(model)}
    kept = config.out / f"{path.stem}.pt"
    if kept.exists():
        runs.check(kept, settings, length="")
        found: dict[str, Any] = torch.load(kept, weights_only=True)["result"]
        return found
    rng = torch.Generator().manual_seed(config.draw + 1)
    starts = torch.randn(config.targets, config.starts, model.noise_size, generator=rng)
    targets = as_floats(where.data.pixels[where.chosen]).to(config.device)
    reconstructed, errors = inversion.reconstruct(g, targets, starts, steps=config.steps)
    rng = torch.Generator().manual_seed(config.draw + 3)  # whatever the starts are
    samples = cifar10.generated(g, torch.randn(config.samples, model.noise_size, generator=rng))
    result = {
        "images": as_bytes(reconstructed),
        "mse": errors,
        "distances": pairwise(samples, config.distances, rng),
        "provenance": runs.provenance(),
    }
    content = {"settings": settings, "result": result}
    runs.write_atomically(kept, lambda draft: torch.save(content, draft))
    return result


def record(where: Setting, model: cifar10.Config, result: Mapping[str, Any]) -> None:
    """Append a row an image to one record, and the histogram in numbers to the other."""
    config = where.config
    facts = {name: getattr(model, name) for name in FACTS}
    facts |= {"device": config.device, **result["provenance"]}
    rng = torch.Generator().manual_seed(config.draw + 2)
    other = pairwise(where.data.pixels, config.distances, rng)
    own, real = result["distances"], where.real
    numbers = {
        "median": own.median().item(),
        "median_data": real.median().item(),
        "wasserstein": wasserstein_distance(own, real),
        "wasserstein_data": wasserstein_distance(other, real),  # what equals would have
    }
    pairs = zip(where.chosen.tolist(), result["mse"].tolist(), strict=True)
    inverted = [{"image": image, "mse": f"{mse:.6g}"} for image, mse in pairs]
    distant = [{name: f"{number:.6g}" for name, number in numbers.items()}]
    for name, rows, names in (
        ("inversion", inverted, INVERSION),
        ("distances", distant, DISTANCES),
    ):
        how = {name: getattr(config, name) for name in names}
        first = {"experiment": f"cifar10_{name}", **facts, **how}
        for row in rows:
            key = [*first, *({"image"} & row.keys())]
            records.append(config.records / f"cifar10_{name}.csv", first | row, key=key)


def draw_reconstructions(
    path: Path, targets: Tensor, results: Mapping[int, Mapping[str, Any]]
) -> None:
    """Draw the images whose errors differ most between the fewest and the most steps."""
    ks = sorted(results)
    low, high = results[ks[0]]["mse"], results[ks[-1]]["mse"]
    fraction = ((low - high) / high).abs()
    chosen = fraction.argsort(descending=True)[: ROWS * BLOCKS].tolist()
    wide = BLOCKS * (len(ks) + 1)
    size = 0.62 * wide, 0.78 * ROWS + 0.5
    figure, axes = plt.subplots(ROWS, wide, figsize=size, squeeze=False)
    figure.subplots_adjust(0.01, 0.03, 0.99, 0.95, wspace=0.08, hspace=0.28)
    for ax in axes.flat:
        ax.axis("off")
    for number, row in enumerate(axes):
        cells = []
        for image in chosen[number::ROWS]:
            cells.append((targets[image], ""))
            found = [results[k] for k in ks]
            cells += [(one["images"][image], f"{one['mse'][image]:.4f}") for one in found]
        for ax, (image, text) in zip(row, cells, strict=False):
            images.show(ax, image)
            ax.text(0.5, -0.03, text, transform=ax.transAxes, ha="center", va="top", fontsize=6.5)
    titles = ["data", *(f"{k} step{'s' * (k != 1)}" for k in ks)]
    for ax, title in zip(axes[0], titles * BLOCKS, strict=True):
        ax.set_title(title, fontsize=8)
    plots.save(figure, path)


def draw_distances(path: Path, real: Tensor, found: Mapping[tuple[int, int], Tensor]) -> None:
    """Draw a panel for each K: data in red, seeds in blue, medians as vertical lines."""
    ks = sorted({k for k, _ in found})
    bins = np.histogram_bin_edges(torch.cat([real, *found.values()]).numpy(), 120)
    how = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(ks), 1, figsize=(5.5, 1.5 * len(ks) + 0.4), **how)
    for ax, k in zip(axes[:, 0], ks, strict=True):
        own = [sample for (of_k, _), sample in found.items() if of_k == k]
        for sample in (real, *own):
            color, width = ("tab:red", 1.4) if sample is real else ("tab:blue", 0.8)
            line = {"color": color, "linewidth": width}
            ax.hist(sample.numpy(), bins, density=True, histtype="step", **line)
            ax.axvline(torch.median(sample).item(), linestyle="--", alpha=0.7, **line)
        ax.set(ylabel="density", title=f"{k} step{'s' * (k != 1)}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0)
    axes[0, 0].set(xlim=(0, None), ylim=(0, None))  # shared by all
    axes[-1, 0].set_xlabel("$\\ell_2$ distance of a pair, pixels in [-1, 1]")
    plots.save(figure, path)


def report(folder: Path, where: Setting, found: Mapping[Path, tuple[cifar10.Config, Any]]) -> None:
    """Print the table, and draw Fig. 5, App. G's pages and Fig. 6."""
    results = {(model.unroll_steps, model.seed): result for model, result in found.values()}
    targets = where.data.pixels[where.chosen]
    for seed in sorted({seed for _, seed in results}):
        of_seed = {k: result for (k, own), result in results.items() if own == seed}
        path = folder / f"cifar10_reconstructions_seed{seed}.png"
        draw_reconstructions(path, targets, of_seed)
    own = {key: result["distances"] for key, result in results.items()}
    draw_distances(folder / "cifar10_distances.png", where.real, own)
    frame = pd.DataFrame(
        {
            "setting": f"K = {k}",
            "models": sum(of_k == k for of_k, _ in results),
            "mse": result["mse"].mean().item(),
            "wasserstein": wasserstein_distance(result["distances"], where.real),
        }
        for (k, _), result in results.items()
    )
    print(columns.table(frame, ["models", "mse", "wasserstein"]))
    print("\n" + columns.sentence(frame, "mse", "reconstructs images to an error of {}"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, record and draw."""
    flags = (tyro.conf.FlagCreatePairsOff,)
    config = tyro.cli(Config, description=__doc__, args=arguments, config=flags)
    torch.set_num_threads(1)
    found = {}
    try:
        trained = models(config.checkpoints)
        progress = tqdm(trained.items(), unit="model")
        where = setting(config)
        for path, model in trained.items():
            if (model.data, model.images) != (where.data.name, len(where.data.pixels)):
                raise ValueError(
                    f"--data-root must be what {path} was trained on, {model.images} images of "
                    f"{model.data}, it has {len(where.data.pixels)} of {where.data.name}"
                )
        runs.check_writable("--out", config.out)
        for path, model in progress:
            found[path] = model, measure(path, where)
            if config.record:
                record(where, *found[path])
    except (OSError, ValueError) as error:
        runs.refuse(error)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the same command continues.")
    report(config.figures or config.out, where, found)


if __name__ == "__main__":
    main()
