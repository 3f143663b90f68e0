"""Losses, norms and times of every pair of updates, kept in the run's checkpoint."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Trace:
    """A number a pair in every column, and tensors that later evaluations come back to."""

    def __init__(self, *columns: str) -> None:
        self.columns: dict[str, list[float]] = {name: [] for name in columns}
        self.kept: dict[int, Tensor] = {}  # by the pairs that were done

    def add(self, **values: float | Tensor) -> None:
        for name, column in self.columns.items():
            value = values[name]
            column.append(value.item() if isinstance(value, Tensor) else value)

    def mean(self, name: str, start: int = 0) -> float:
        """Return the mean from a pair on; NaN where there is none."""
        values = self.columns[name][start:]
        return sum(values) / len(values) if values else math.nan

    def median(self, name: str) -> float:
        """Return the median over all pairs; NaN where there is none."""
        return statistics.median(self.columns[name]) if self.columns[name] else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"columns": self.columns, "kept": self.kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.columns, self.kept = state_dict["columns"], state_dict["kept"]
