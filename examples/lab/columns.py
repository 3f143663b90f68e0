"""Numbers over models as text, and what the columns of the records mean."""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = Path(__file__).resolve().parents[2] / "docs"
COLUMNS: dict[str, tuple[str, str]] = tomllib.loads(
    (DOCS / "experiments" / "columns.toml").read_text()
)


def title(name: str) -> str:
    return COLUMNS.get(name, (name.replace("_", " "), ""))[0]


def explained(names: Iterable[str]) -> str:
    """Return the meanings of those columns that have one."""
    known = [COLUMNS[name] for name in names if name in COLUMNS]
    return "; ".join(f"{heading}: {meaning}" for heading, meaning in known) + "."


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error: 0 of a single value."""
    array = np.asarray(values, dtype=float)
    error = array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else 0.0
    return float(array.mean()), float(error)


def shown(values: Sequence[float]) -> str:
    """Return "mean ± standard error", with two digits of the error; whole numbers as such."""
    mean, error = moments(values)
    if math.isnan(mean):
        return "n/a"
    if error < 1e-12:
        return f"{mean:,.0f}" if float(mean).is_integer() else f"{mean:,.4g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 5)
    return f"{mean:,.{digits}f} ± {error:,.{digits}f}"


def table(rows: pd.DataFrame, names: Sequence[str]) -> str:
    """Return the columns' means and standard errors for each "setting", and their meanings."""
    settings = rows.groupby("setting", sort=False)
    text = pd.DataFrame({title(name): settings[name].agg(shown) for name in names})
    return f"\n{text.rename_axis(None).to_string()}\n\n{explained(names)}"


def sentence(rows: pd.DataFrame, name: str, text: str) -> str:
    """Return a sentence on the means of a column: "K = 0 holds 1 of 8 modes, K = 10 8"."""
    means = rows.groupby("setting", sort=False)[name].agg(lambda values: moments(values)[0])
    return ", ".join(f"{label} {text.format(f'{mean:.3g}')}" for label, mean in means.items()) + "."
