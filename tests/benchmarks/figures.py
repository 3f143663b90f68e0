"""Time and memory against K, readable in black and white."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmarks.networks import NETWORKS
from tests.benchmarks.peers import PEERS, UNROLL
from tests.benchmarks.record import ROOT, Row

FIGURES = ROOT / "docs" / "figures"
MARKERS = dict(zip(PEERS, "xosD^v<*", strict=True))
DASHES = dict(zip(PEERS, (":", "-", "--", "-.", "-", "--", "-.", ":"), strict=True))
Value = Callable[[Row, Sequence[Row]], float | None]


def to_plain(row: Row, _: Sequence[Row]) -> float | None:
    """Return the time of a step over that of K training steps of D, measured in its rounds."""
    return float(row["vs_plain"]) if row["vs_plain"] else None


def above_no_steps(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the peak memory above that of the same peer at K = 0, in MiB."""
    same = ("network", "allocator", "peer", "torch")
    for other in rows:
        if other["unroll_steps"] == "0" and all(other[c] == row[c] for c in same):
            if not (row["peak_mib"] and other["peak_mib"]):
                return None
            return max(float(row["peak_mib"]) - float(other["peak_mib"]), 0.0)
    return None


def panel(axes: Axes, rows: Sequence[Row], value: Value, least: float) -> None:
    """Draw one network's lines; K = 0 has no place on a logarithmic axis."""
    for peer in PEERS:
        own = [row for row in rows if row["peer"] == peer and row["unroll_steps"] != "0"]
        points = [(int(row["unroll_steps"]), value(row, rows)) for row in own]
        drawn = sorted((k, y) for k, y in points if y is not None and y >= least)
        if drawn:
            xs, ys = zip(*drawn, strict=True)
            grey = "black" if peer.startswith(UNROLL) else "0.45"
            axes.plot(
                xs, ys, label=peer, color=grey, markersize=4, linewidth=1,
                marker=MARKERS[peer], linestyle=DASHES[peer],
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="K")


def figure(rows: Sequence[Row], value: Value, label: str, least: float = 0.0) -> Figure:
    """Return a panel for every network (columns) with values, and every allocator (rows).

    A network with one K, and an allocator with a K or two, are in the tables alone.
    """
    ahead = [r for r in rows if r["unroll_steps"] != "0"]
    known = {(r["network"], r["unroll_steps"]) for r in ahead if (value(r, rows) or 0.0) > least}
    lengths = Counter(network for network, _ in known)
    networks = [name for name in NETWORKS if lengths[name] > 1]
    measured = {(r["allocator"], r["unroll_steps"]) for r in ahead}
    counts = Counter(allocator for allocator, _ in measured)
    allocators = sorted(a for a in counts if counts[a] == max(counts.values()) or counts[a] > 2)
    size = (3 * len(networks) + 2, 2.6 * len(allocators) + 0.4)
    drawn = Figure(figsize=size, layout="constrained")
    grid = drawn.subplots(len(allocators), len(networks), squeeze=False, sharex=True)
    for line, allocator in zip(grid, allocators, strict=True):
        for axes, network in zip(line, networks, strict=True):
            of_panel = [r for r in rows if (r["network"], r["allocator"]) == (network, allocator)]
            panel(axes, of_panel, value, least)
            axes.set_title(f"{network}, malloc: {allocator}", fontsize=9)
        line[0].set_ylabel(label)
    ks = sorted({int(k) for _, k in measured})
    grid[0][0].set_xticks(ks, [str(k) for k in ks])  # of all panels, which share them
    grid[0][0].set_xticks([], minor=True)
    found: dict[str, Artist] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    drawn.legend(found.values(), found.keys(), loc="outside right center", fontsize=8)
    return drawn


def draw(rows: Sequence[Row], folder: Path = FIGURES) -> None:
    """Write both figures."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"Software": None}  # no version in the file: the same record, the same bytes
    with mpl.rc_context({"font.size": 9}):
        time = figure(rows, to_plain, "time / K training steps of D")
        time.savefig(folder / "benchmark_time.png", dpi=120, metadata=kept)
        memory = figure(rows, above_no_steps, "MiB above K = 0", least=1.0)
        memory.savefig(folder / "benchmark_memory.png", dpi=120, metadata=kept)
