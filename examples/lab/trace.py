"""What every pair of updates left behind: losses, norms, times; kept in the run's checkpoint."""

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor


class Trace:
    """A row of numbers a pair, and tensors that later evaluations come back to."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.rows: list[tuple[float, ...]] = []
        self.kept: dict[int, Tensor] = {}  # by the pairs that were done

    def add(self, **values: float | Tensor) -> None:
        numbers = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        self.rows.append(tuple(numbers[column] for column in self.columns))

    def column(self, name: str, start: int = 0) -> list[float]:
        number = self.columns.index(name)
        return [row[number] for row in self.rows[start:]]

    def mean(self, name: str, start: int = 0) -> float:
        """Return the mean from a pair on; NaN where there is none."""
        values = self.column(name, start)
        return sum(values) / len(values) if values else math.nan

    def median(self, name: str) -> float:
        """Return the median over all pairs; NaN where there is none."""
        return median(self.column(name)) if self.rows else math.nan

    def state_dict(self) -> dict[str, Any]:
        rows = torch.tensor(self.rows, dtype=torch.float64).view(-1, len(self.columns))
        return {"rows": rows, "kept": dict(self.kept)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.rows = [tuple(row) for row in state_dict["rows"].tolist()]
        self.kept = dict(state_dict["kept"])
