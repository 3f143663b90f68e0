"""The record of the benchmark: a row for every cell and peer."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "results" / "benchmarks.csv"
CELL = ("network", "unroll_steps", "allocator")
COLUMNS = (
    *("network", "unroll_steps", "batch_size", "allocator", "peer", "status"),
    *("median_ms", "low_ms", "high_ms", "rounds"),
    *("vs_plain", "best_torch_peer", "vs_best_torch_peer", "vs_jax"),
    *("peak_mib", "first_ms", "gradient_error"),
    *(
        "device",
        "threads",
        "load_average",
        "torch",
        "torchopt",
        "higher",
        "jax",
        "optax",
        "jax_form",
        "revision",
    ),
)
Row = dict[str, str]


@dataclass(frozen=True)
class Cell:
    """What is timed side by side."""

    network: str
    unroll_steps: int
    allocator: str

    def __str__(self) -> str:
        return f"{self.network} K={self.unroll_steps} {self.allocator}"


def revision() -> str:
    """Return the commit; one with changed sources ends in "+"."""
    git = ("git", "-C", str(ROOT))
    changed = (*git, "status", "--porcelain", "--", "unroll", "tests/benchmarks")
    head, dirty = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for command in ((*git, "rev-parse", "--short=10", "HEAD"), changed)
    )
    return head + "+" * bool(dirty)


class Record:
    """Rows, and the file where they are kept."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, list[Row]()
        if path is not None and path.exists():
            with path.open(newline="") as file:
                self.rows = [dict.fromkeys(COLUMNS, "") | row for row in csv.DictReader(file)]

    def _of(self, cell: Cell) -> list[Row]:
        key = (cell.network, str(cell.unroll_steps), cell.allocator)
        return [row for row in self.rows if tuple(row[c] for c in CELL) == key]

    def holds(self, cell: Cell, revision: str, threads: int) -> bool:
        """Return whether a cell was measured at a revision, with that many threads."""
        rows = self._of(cell)
        found = {(row["revision"], row["threads"]) for row in rows}
        return found == {(revision, str(threads))}

    def replace(self, cell: Cell, rows: Sequence[Row]) -> None:
        """Put a cell's rows in place of its old ones, and write."""
        old = self._of(cell)
        self.rows = [row for row in self.rows if row not in old] + list(rows)
        self.rows.sort(key=lambda r: (r["allocator"], r["network"], int(r["unroll_steps"])))
        if self.path is not None:
            draft = self.path.with_suffix(".draft")
            with draft.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)
            draft.replace(self.path)


def table(rows: Sequence[Row]) -> str:
    """Return a cell as text."""
    columns = {
        "peer": "",
        "median_ms": "ms",
        "low_ms": "25 %",
        "high_ms": "75 %",
        "vs_plain": "/ plain",
        "vs_best_torch_peer": "/ best peer",
        "vs_jax": "/ JAX",
        "peak_mib": "peak MiB",
        "first_ms": "first ms",
        "gradient_error": "error",
        "rounds": "rounds",
    }
    lines = [list(columns.values())]
    for row in rows:
        values = [row[column] for column in columns]
        if row["status"] != "ok":
            values = [row["peer"], row["status"]] + [""] * (len(columns) - 2)
        lines.append(values)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )
