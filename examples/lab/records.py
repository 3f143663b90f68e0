"""One row for each finished run, appended to a CSV file that feeds the documentation's tables."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

RENAMED = {  # fields of settings, and what the records have called them from the start
    "generator_learning_rate": "generator_lr",
    "discriminator_learning_rate": "discriminator_lr",
}
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under the names that the records have for them."""
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def append(path: Path, row: Mapping[str, object], *, key: Sequence[str]) -> bool:
    """Append a row, unless one with the same key is there, and return whether it was.

    Several processes may do so at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("a+", newline="") as file:
        file.seek(0)
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or row)
        if odd := sorted(set(columns) ^ set(row)):
            raise ValueError(f"{path} has other columns ({odd}): give another file")
        if any(all(old[k] == str(row[k]) for k in key) for old in reader):
            return False
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
    return True
