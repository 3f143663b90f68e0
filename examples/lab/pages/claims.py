"""Published claims against records: comparisons of settings over seeds, and verdicts."""

import csv
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

Row = Mapping[str, str]
Setting = Mapping[str, object]
Value = str | Callable[[Row], float]  # of a row: a column, or what follows from several
FEWEST = 3  # seeds a side, to judge by
TOO_FEW = "too few runs to say"
TOO_EARLY = "too early to say"
NOT_CONTRADICTED = "not contradicted"
NOT_SEEN = "not seen"
LEVEL = 0.05  # of the tests
HEAD = ("claim", "of", "ours", "seeds", "verdict")


@dataclass(frozen=True)
class Comparison:
    """Two settings' values over seeds, and what a claim says of their means.

    Args:
        text: What is compared.
        larger: The values of one setting.
        smaller: Those of the other.
        says: The claim: the means of the first are "larger", "not larger", or both are "alike".
    """

    text: str
    larger: Sequence[float]
    smaller: Sequence[float]
    says: str = "larger"

    def __str__(self) -> str:
        """Return the comparison in words."""
        digits = _digits(max(moments(side)[1] for side in (self.larger, self.smaller)))
        values = [shown(side, digits) for side in (self.larger, self.smaller)]
        return f"{self.text}: {values[0]} against {values[1]} ({self.finding})"

    @property
    def finding(self) -> str:
        """Return what the values say of the claim, by Welch's t test, two-sided, at 5 %."""
        if not differ(self.larger, self.smaller):
            return "no difference"
        if self.says == "alike":
            return "they differ"
        first_is_larger = moments(self.larger)[0] > moments(self.smaller)[0]
        return "for" if first_is_larger is (self.says == "larger") else "the reverse"

    @property
    def agrees(self) -> bool:
        """Return whether the values do not speak against the claim."""
        return self.finding == "for" or (self.says != "larger" and self.finding == "no difference")

    @property
    def seeds(self) -> set[int]:
        """Return how many there are."""
        return {len(self.larger), len(self.smaller)}


@dataclass(frozen=True)
class Count:
    """The seeds that do what a claim says of some of them, or of all.

    Args:
        text: What they do.
        seen: Whether each of them does.
        every: Whether the claim is of all of them.
    """

    text: str
    seen: Sequence[bool]
    every: bool = False

    def __str__(self) -> str:
        """Return the count in words."""
        return f"{self.text}: {sum(self.seen)} of {len(self.seen)} ({self.finding})"

    @property
    def finding(self) -> str:
        """Return what the seeds say of the claim."""
        if not any(self.seen):
            return "none"
        return "for" if all(self.seen) or not self.every else "some"

    @property
    def agrees(self) -> bool:
        """Return whether enough of them do it."""
        return self.finding == "for"

    @property
    def seeds(self) -> set[int]:
        """Return how many there are."""
        return {len(self.seen)}


Finding = Comparison | Count
Claim = tuple[Any, ...]  # source, claim, findings; and perhaps that it is too early to judge


def differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two means differ by Welch's t test, two-sided, at 5 %."""
    means, errors = zip(moments(one), moments(other), strict=True)
    if not any(errors):
        return means[0] != means[1]
    if min(len(one), len(other)) < 2:
        return False
    deviations = [
        error * math.sqrt(len(side)) for error, side in zip(errors, (one, other), strict=True)
    ]
    found = stats.ttest_ind_from_stats(
        means[0], deviations[0], len(one), means[1], deviations[1], len(other), equal_var=False
    )
    return bool(found.pvalue < LEVEL)


def _digits(error: float) -> int:
    """Return how many decimals show two digits of a standard error."""
    return 2 if error == 0 else min(max(1 - math.floor(math.log10(error)), 0), 5)


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


def verdict(findings: Sequence[Finding]) -> str:
    """Return the verdict on a claim."""
    agreeing = sum(finding.agrees for finding in findings)
    words = {finding.finding for finding in findings}
    if agreeing == len(findings):
        return NOT_CONTRADICTED if "no difference" in words else "holds"
    if agreeing or "some" in words:
        return "partly"
    return NOT_SEEN if words == {"no difference"} else "does not hold"


def claims(given: Iterable[Claim], *, early: bool = False) -> str:
    """Return the table of claims: who says what, what we found and the verdict.

    Args:
        given: Who says it, the claim, and the findings; fourth, where it is so, that the runs are
            too short to judge it by.
        early: Whether they are too short for any of them.
    """
    lines = []
    for source, claim, findings, *short in given:
        if not findings:
            lines.append((claim, source, "not run", "", "none"))
            continue
        counts = set[int]().union(*(finding.seeds for finding in findings))
        seeds = "-".join(map(str, sorted(counts)))
        judged = verdict(findings) if min(counts) >= FEWEST else TOO_FEW
        judged = TOO_EARLY if early or any(short) else judged
        lines.append((claim, source, "; ".join(map(str, findings)), seeds, f"**{judged}**"))
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
        says: str = "larger",
    ) -> list[Comparison]:
        """Return the comparison of a column in two settings, if both were run."""
        value = column if callable(column) else lambda row: float(row[column])
        high, low = ([value(row) for row in self.pick(**s).rows] for s in (larger, smaller))
        return [Comparison(text, high, low, says)] if high and low else []


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
