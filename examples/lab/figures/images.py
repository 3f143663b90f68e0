"""The results of an experiment on images: a grid of samples over training, curves, a table.

Images are `(N, 1 or 3, height, width)`, floats in [-1, 1] as a generator makes them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from torch import Tensor

from lab import study
from lab.data.pixels import as_floats
from lab.figures import plots
from lab.runs import write_atomically


def tile(images: Tensor, columns: int = 8) -> Tensor:
    """Return one image `(3, height, width)` in [0, 1] of all, row by row, on white."""
    from torchvision.utils import make_grid  # slow to import

    unit = images.detach().float().cpu().add(1).div(2).clamp(0, 1)
    return make_grid(unit, nrow=columns, padding=1, pad_value=1.0)


def write(path: Path, images: Tensor, columns: int = 8) -> None:
    """Write the images as one, pixel by pixel."""
    from torchvision.utils import save_image  # slow to import

    write_atomically(path, partial(save_image, tile(images, columns), format="png"))


def show(ax: Axes, image: Tensor) -> None:
    """Draw one image, `(3, height, width)`, in [0, 1] or of bytes."""
    ax.imshow(image.movedim(0, -1).numpy(), interpolation="nearest")


def report(
    name: str,
    results: study.Results,
    *,
    curves: Mapping[str, str],
    table: Sequence[str],
    ideal: Mapping[str, float] | None = None,
) -> None:
    """Print the table, and draw samples over training, 16 of each setting, and curves of all."""
    results.table(*table)
    snapshots = {
        label: dict(zip((row["pairs"] for row in log["history"]), log["snapshots"], strict=True))
        for label, log in results.first_logs.items()
    }
    pairs = list(max(snapshots.values(), key=len))
    moments = [pairs[i] for i in plots.spread(len(pairs), 5)]
    cells = {
        label: [tile(as_floats(at[moment][:16]), 4) for moment in moments if moment in at]
        for label, at in snapshots.items()
    }
    plots.grid(
        results.folder / f"{name}.png",
        cells,
        [f"{moment:,}" for moment in moments],
        show,
        size=(1.3 * len(moments) + 0.4, 1.3 * len(cells) + 0.5),
        caption=f"pairs of updates (preset {results.first.preset}, "
        f"seed {results.options.first_seed})",
    )
    plots.curves(results.folder / f"{name}_curves.png", results.frame, curves, ideal=ideal or {})
