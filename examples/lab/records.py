"""One row a finished run, appended to a CSV file that the documentation is generated from."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from lab.runs import write_atomically

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def row(
    experiment: str, config: Any, result: Mapping[str, Any], log: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a row of a finished run: its settings, what came of it, and its provenance.

    Args:
        experiment: Its name.
        config: A dataclass with `batch_size` and `device`.
        result: The metrics, `player_updates` among them.
        log: What `runs.iterate` wrote.
    """
    settings = asdict(config)
    batch_size, device = settings.pop("batch_size"), settings.pop("device")
    size = {"player_updates": result["player_updates"], "batch_size": batch_size}
    row = {"experiment": experiment, **settings, **size, **result, "device": device}
    return row | log["provenance"]


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV file of rows that have the same columns."""

    def draw_up(draft: Path) -> None:
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, draw_up)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda draft: draft.write_text(text))


def append(path: Path, row: Mapping[str, object], *, key: Sequence[str]) -> bool:
    """Append a row, unless one with the same key is there; safe under several processes.

    Returns:
        Whether the row was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("a+", newline="") as file:
        file.seek(0)
        reader = csv.DictReader(file)
        if reader.fieldnames is not None and list(reader.fieldnames) != list(row):
            odd = sorted(set(reader.fieldnames) ^ set(row)) or "their order"
            raise ValueError(f"{path} has other columns ({odd}): give another file")
        if any(all(old[k] == str(row[k]) for k in key) for old in reader):
            return False
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
    return True


Histories = Mapping[str, Sequence[Sequence[Mapping[str, float]]]]  # rows of each seed of a setting


def table(histories: Histories, columns: Mapping[str, str]) -> str:
    """Format the last metrics of every setting: means over seeds, and their standard errors."""
    lines = [["", "seeds", *columns.values()]]
    for label, seeds in histories.items():
        cells = [label, str(len(seeds))]
        for metric in columns:
            values = torch.tensor([history[-1][metric] for history in seeds], dtype=torch.float64)
            error = f" ± {values.std() / len(seeds) ** 0.5:.2f}" if len(seeds) > 1 else ""
            cells.append(f"{values.mean():.2f}{error}")
        lines.append(cells)
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join("".join(map(str.rjust, line, widths)) for line in lines)
