"""Published claims against records: comparisons of settings over seeds, and verdicts."""

import csv
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Row = Mapping[str, str]
Setting = Mapping[str, object]
Value = str | Callable[[Row], float]  # of a row: a column, or what follows from several
FEWEST = 3  # seeds a side, to judge by
TOO_FEW = "too few runs to say"
TOO_EARLY = "too early to say"
HEAD = ("claim", "of", "ours", "seeds", "verdict")


@dataclass(frozen=True)
class Comparison:
    """Two settings' values over seeds; the claim is that the first are the larger ones.

    Args:
        text: What is compared.
        larger: The values of one setting.
        smaller: Those of the other.
        denied: Whether the claim is that the first are not the larger ones.
    """

    text: str
    larger: Sequence[float]
    smaller: Sequence[float]
    denied: bool = False

    def __str__(self) -> str:
        """Return the comparison in words."""
        small = max(moments(self.larger)[0], moments(self.smaller)[0]) < 1
        values = [shown(side, 3 if small else 2) for side in (self.larger, self.smaller)]
        return f"{self.text}: {values[0]} against {values[1]} ({self.finding})"

    @property
    def finding(self) -> str:
        """Return whether the means differ by more than two standard errors of the difference."""
        (a, a_error), (b, b_error) = moments(self.larger), moments(self.smaller)
        enough = 2 * math.hypot(a_error, b_error)
        if (a - b > enough) is not self.denied:
            return "for"
        return "the reverse" if self.denied or b - a > enough else "no difference"


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Return "mean ± standard error"."""
    mean, error = moments(values)
    return f"{mean:,.{digits}f} ± {error:,.{digits}f}"


def brief(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean, with its standard error where there is one."""
    return shown(values, digits) if len(values) > 1 else f"{values[0]:,.{digits}f}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [list(head), ["---"] * len(head), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict on a claim."""
    right = sum(comparison.finding == "for" for comparison in comparisons)
    return "partly" if 0 < right < len(comparisons) else "holds" if right else "does not hold"


def claims(given: Iterable[tuple[str, str, Sequence[Comparison]]], *, early: bool = False) -> str:
    """Return the table of claims: who says what, our comparisons and the verdict.

    Args:
        given: Who says it, the claim, and its comparisons.
        early: Whether the runs are too short to judge by.
    """
    lines = []
    for source, claim, comparisons in given:
        if not comparisons:
            lines.append((claim, source, "not run", "", "none"))
            continue
        ours = "; ".join(map(str, comparisons))
        counts = {len(values) for c in comparisons for values in (c.larger, c.smaller)}
        seeds = "-".join(map(str, sorted(counts)))
        judged = verdict(comparisons) if min(counts) >= FEWEST else TOO_FEW
        judged = TOO_EARLY if early else judged
        lines.append((claim, source, ours, seeds, f"**{judged}**"))
    return table(HEAD, lines)


class Records:
    """The rows of an experiment, looked up by their settings."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def settings(self, *names: str) -> list[tuple[str, ...]]:
        """Return the settings that were run, in order."""
        found = {tuple(row[name] for name in names) for row in self.rows}
        return sorted(found, key=lambda values: [(_number(value), value) for value in values])

    def pick(self, **settings: object) -> "Records":
        """Return the rows with these settings."""
        wanted = {name: str(value) for name, value in settings.items()}
        return Records([r for r in self.rows if all(r[n] == v for n, v in wanted.items())])

    def most(self, column: str) -> "Records":
        """Return the rows with the number in a column that most rows have, the larger of equals."""
        if not self.rows:
            return self
        found = [int(row[column]) for row in self.rows]
        return self.pick(**{column: max(found, key=lambda number: (found.count(number), number))})

    def values(self, column: str) -> list[float]:
        """Return a column, one number a seed."""
        return [float(row[column]) for row in self.rows]

    def compare(
        self,
        text: str,
        column: Value,
        larger: Setting,
        smaller: Setting,
        *,
        denied: bool = False,
    ) -> list[Comparison]:
        """Return the comparison of a column in two settings, if both were run."""
        value = column if callable(column) else lambda row: float(row[column])
        high, low = ([value(row) for row in self.pick(**s).rows] for s in (larger, smaller))
        return [Comparison(text, high, low, denied)] if high and low else []


def read(path: Path) -> Records:
    """Return the rows of a record: none where there is none."""
    if not path.exists():
        return Records([])
    with path.open(newline="") as file:
        return Records(list(csv.DictReader(file)))


def wrapped(text: str) -> str:
    """Return a paragraph."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf
