"""Verdicts on published claims by one rule, which docs/experiments/README.md states.

The unit is a trained model. A part of a claim compares two groups of models, counts the models that
do something, or follows a trend over all of them.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lab.columns import shown, tomllib
from scipy import stats

LEVEL = 0.05
VERDICTS = ("supported", "partly supported", "refuted", "inconclusive")
TOO_SHORT, TOO_POOR, TOO_FEW, NOT_RUN = (
    f"inconclusive: {why}" for why in ("too short", "samples too poor", "too few models", "not run")
)
FEWEST = 4  # models a side: with three, no rank test reaches 5 %
FEWEST_COUNTED = 6  # models of which most are to do something: with five, no binomial test does
RATES = "generator_lr", "learning_rate", "lr"


@dataclass(frozen=True)
class Part:
    """What the models say of a part of a claim.

    Args:
        text: What is compared.
        values: The means, or the count.
        counts: Models a side.
        effect: The effect: a difference of means, a share or a slope.
        interval: Its 95 % confidence interval.
        p: Of Welch's test, the binomial test or the regression; Holm's correction is applied later.
        rank_p: Of the rank test; 0 where there is none.
        kind: "greater", "alike", "not greater", "share" or "trend".
        margin: Of what counts as alike.
        short: Whether the models are trained too little to say.
        blurred: Whether those that are claimed to do better fail the test of quality: they may
            refute a claim, but not support it.
    """

    text: str
    values: str
    counts: tuple[int, ...]
    effect: float
    interval: tuple[float, float]
    p: float
    rank_p: float = 0.0
    kind: str = "greater"
    margin: float = 0.0
    short: bool = False
    blurred: bool = False

    @property
    def finding(self) -> str:
        """Return "for", "against", "undecided", "too few", "too short" or "too poor"."""
        if self.short:
            return "too short"
        if min(self.counts) < (FEWEST_COUNTED if self.kind == "share" else FEWEST):
            return "too few"
        found = self._found()
        return "too poor" if self.blurred and found != "against" else found

    def _found(self) -> str:
        significant = self.p < LEVEL and self.rank_p < LEVEL
        if self.kind == "alike":
            if -self.margin <= self.interval[0] and self.interval[1] <= self.margin:
                return "for"
            return "against" if significant else "undecided"
        if self.kind == "not greater":
            if self.interval[1] <= self.margin:
                return "for"
            return "against" if significant and self.effect > 0 else "undecided"
        centre = 0.5 if self.kind == "share" else 0.0
        if not significant:
            return "undecided"
        return "for" if self.effect > centre else "against"


def compared(
    text: str, high: Sequence[float], low: Sequence[float], *, smaller: bool = False, **how: Any
) -> Part:
    """Compare two groups of models; a positive effect speaks for the first.

    Args:
        text: What is compared.
        high: The metric of the models that are claimed to do better.
        low: That of the others.
        smaller: Whether less is better.
        how: `kind`, `margin`, `short`, `blurred`.
    """
    sign = -1 if smaller else 1
    one, other = (np.asarray(side, dtype=float) for side in (high, low))
    values = f"{shown(one)} against {shown(other)}"
    effect = sign * (one.mean() - other.mean())
    counts = len(one), len(other)
    if min(counts) < 2:
        return Part(text, values, counts, effect, (-math.inf, math.inf), 1.0, 1.0, **how)
    if one.std() == other.std() == 0:  # no spread: any difference is certain
        p = float(effect == 0)
        interval = (effect, effect)
    else:
        with warnings.catch_warnings():  # of models that hardly differ
            warnings.simplefilter("ignore", RuntimeWarning)
            welch = stats.ttest_ind(sign * one, sign * other, equal_var=False)
        p, interval = float(welch.pvalue), tuple(map(float, welch.confidence_interval()))
    rank_p = float(stats.mannwhitneyu(one, other).pvalue)
    return Part(text, values, counts, effect, interval, p, rank_p, **how)


def counted(text: str, seen: Sequence[bool], **how: Any) -> Part:
    """Count the models that do what a claim says of them: more than half are to."""
    found = stats.binomtest(int(sum(seen)), len(seen))
    low, high = found.proportion_ci()
    share = found.statistic
    values = f"{sum(seen)} of {len(seen)}"
    how |= {"kind": "share"}
    return Part(text, values, (len(seen),), share, (low, high), float(found.pvalue), **how)


def trend(text: str, x: Sequence[float], y: Sequence[float], *, smaller: bool, **how: Any) -> Part:
    """Follow a metric over the models' settings: the slope against log2(1 + setting)."""
    sign = -1 if smaller else 1
    where, values = np.log2(1 + np.asarray(x, dtype=float)), sign * np.asarray(y, dtype=float)
    line = stats.linregress(where, values)
    half = stats.t.ppf(0.975, len(values) - 2) * line.stderr
    interval = float(line.slope - half), float(line.slope + half)
    ranks = float(stats.spearmanr(where, values).pvalue)
    means = [f"{shown(sign * values[where == w])}" for w in np.unique(where)]
    how |= {"kind": "trend"}
    slope, p = float(line.slope), float(line.pvalue)
    return Part(text, ", ".join(means), (len(values),), slope, interval, p, ranks, **how)


def corrected(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with Holm's correction of their p values; those too short do not count."""
    judged = sorted((i for i, part in enumerate(parts) if not part.short), key=lambda i: parts[i].p)
    found, least = list(parts), 0.0
    for rank, i in enumerate(judged):
        least = max(least, min(1.0, (len(judged) - rank) * parts[i].p))
        found[i] = replace(parts[i], p=least)
    return found


def verdict(parts: Sequence[Part]) -> str:
    """Return the verdict on a claim: one of `VERDICTS`, perhaps with a reason."""
    findings = [part.finding for part in parts]
    if not findings:
        return NOT_RUN
    if set(findings) == {"for"}:
        return "supported"
    if "for" in findings:
        return "partly supported"
    if findings.count("against") > len(findings) / 2:
        return "refuted"
    reasons = {"too short": TOO_SHORT, "too poor": TOO_POOR, "too few": TOO_FEW}
    for finding, reason in reasons.items():
        if findings.count(finding) > len(findings) / 2:
            return reason
    return "inconclusive"


@dataclass(frozen=True)
class Claim:
    """A claim of docs/experiments/claims.toml.

    Args:
        page: The page that judges it.
        name: By which the page's text refers to it.
        source: Who makes it.
        quote: Their sentence.
        says: The claim in our words, where there is no sentence of theirs.
        record: The record that judges it.
        metric: The one metric, a column or an expression of columns.
        parts: For each part: a text, and the arms as queries. An arm "A less B" is the difference
            of two, matched by seed.
        where: A query on all arms.
        kind: As in `Part`; for "trend" the second entry of a part is the column of the settings,
            for "share" it is the arm, and the metric says whether a model does it.
        smaller: Whether less is better.
        margin: As in `Part`.
        training: The least learning rate times updates of G: where the source shows its effect.
        pairs: The same in pairs of updates, for records without a rate.
        quality: A column and what its mean has to exceed in the arm that is claimed to be better.
        unit: The columns that tell trained models apart.
        note: What a reader must know of the choice.
    """

    page: str
    name: str
    source: str
    record: str
    metric: str
    parts: list[list[str]]
    quote: str = ""
    says: str = ""
    where: str = "pairs == pairs"
    kind: str = "greater"
    smaller: bool = False
    margin: float = 0.0
    training: float = 0.0
    pairs: int = 0
    quality: tuple[str, float] | tuple[()] = ()
    unit: tuple[str, ...] = ("seed",)
    note: str = ""

    def judged(self, results: Path) -> list[Part]:
        """Return the parts that were run, from the records in a folder."""
        frame = read(results / f"{self.record}.csv")
        if frame.empty:
            return []
        frame = chosen(frame, self.where)
        parts = [self._part(frame, text, arms) for text, *arms in self.parts]
        return [part for part in parts if part is not None]

    def _part(self, frame: pd.DataFrame, text: str, arms: Sequence[str]) -> Part | None:
        """Return what the models say of a part: None where an arm was not run."""
        if self.kind == "trend":
            column, *queries = arms
            rows = self.measured(frame, *queries)
            models = rows.groupby([column, *self.unit], as_index=False)["metric"].mean()
            if models[column].nunique() < 2:
                return None
            most = rows[rows[column] == rows[column].max()]
            how = {
                "smaller": self.smaller,
                "short": self.short(rows),
                "blurred": self.blurred(most),
            }
            return trend(text, models[column], models["metric"], **how)
        groups = [self.values(frame, arm) for arm in arms]
        if not all(groups):
            return None
        rows = self.measured(frame, arms[0].partition(" less ")[0])
        how = {"short": self.short(rows), "blurred": self.blurred(rows)}
        if self.kind == "share":
            return counted(text, [value > 0 for value in groups[0]], **how)
        how |= {"kind": self.kind, "margin": self.margin}
        return compared(text, *groups, smaller=self.smaller, **how)

    def measured(self, frame: pd.DataFrame, *queries: str) -> pd.DataFrame:
        """Return the rows of a query with the metric as a column."""
        rows = chosen(frame, queries[0]) if queries else frame
        return rows.assign(metric=valued(rows, self.metric))

    def values(self, frame: pd.DataFrame, arm: str) -> list[float]:
        """Return the metric of every model of an arm: the mean of its rows."""
        first, less, second = arm.partition(" less ")
        models = self.measured(frame, first).groupby(list(self.unit))["metric"].mean()
        if less:
            other = self.measured(frame, second).groupby(list(self.unit))["metric"].mean()
            models = (models - other).dropna()
        return models.astype(float).tolist()

    def short(self, rows: pd.DataFrame) -> bool:
        """Return whether models are trained less than where the source shows its effect."""
        if rows["pairs"].max() < self.pairs:
            return True
        rate = next((rows[name] for name in RATES if name in rows), None)
        if not self.training or rate is None:
            return False
        steps = rows.get("generator_steps", 1) if "epochs" not in rows else 1
        return bool((rate * rows["pairs"] * steps).max() < self.training * (1 - 1e-6))

    def blurred(self, rows: pd.DataFrame) -> bool:
        """Return whether models fail the test of quality."""
        if not self.quality:
            return False
        column, least = self.quality
        return bool(rows[column].mean() <= least)


def valued(frame: pd.DataFrame, expression: str) -> pd.Series:
    """Return an expression of columns; pandas is slow where it sees those that are not in it."""
    names = frame.columns.intersection(re.findall(r"\w+", expression))
    return frame[names].eval(expression, engine="python")


def chosen(frame: pd.DataFrame, query: str) -> pd.DataFrame:
    """Return the rows of a query."""
    return frame[valued(frame, query)]


@cache
def read(path: Path) -> pd.DataFrame:
    """Return a record: empty where there is none."""
    return pd.read_csv(path, dtype={"revision": str}) if path.exists() else pd.DataFrame()


def claims(path: Path) -> list[Claim]:
    """Return the claims of a file, in its order."""
    return [Claim(**entry) for entry in tomllib.loads(path.read_text())["claim"]]


def judged(claims: Sequence[Claim], results: Path) -> Mapping[str, list[Part]]:
    """Return the parts of a page's claims by name, with Holm's correction over all of them."""
    parts = [claim.judged(results) for claim in claims]
    flat = corrected([part for own in parts for part in own])
    found, start = {}, 0
    for claim, own in zip(claims, parts, strict=True):
        found[claim.name] = flat[start : start + len(own)]
        start += len(own)
    return found
