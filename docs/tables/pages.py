"""What is put into pages from the records: tables, numbers, verdicts.

A page is Markdown that a person edits. What follows from the records stands between a directive, a
comment of HTML, and `<!-- end -->`:

    <!-- table: RECORD | QUERY | COLUMNS | METRICS -->   a line for each setting of COLUMNS
    <!-- value: RECORD | QUERY | METRIC -->              one mean, within a sentence
    <!-- published: QUERY -->                            what others published
    <!-- claims -->                                      the claims of this page and their verdicts
    <!-- verdict: NAME -->                               the verdict on one, within a sentence
    <!-- verdict: PAGE/NAME -->                          the verdict on one of another page
    <!-- experiments -->                                 all pages, with counts of the verdicts
    <!-- results: NAME -->                               a table of the benchmarks

A query is one of pandas: `preset == 'paper' and unroll_steps in (0, 10)`. METRICS may be named:
`largest_mode_share as share`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import pandas as pd
from lab.columns import COLUMNS, DOCS, explained, shown, title

from docs.tables import benchmarks, verdicts
from docs.tables.verdicts import Claim, Part

RESULTS, PAGES = DOCS / "results", DOCS / "experiments"
BLOCK = re.compile(r"<!-- (?P<kind>[a-z]+)(?:: (?P<what>.*?))? -->.*?<!-- end -->", re.DOTALL)
START = re.compile(r"<!-- (?!end )[a-z]+(?:: .*?)? -->")
INLINE = "value", "verdict"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(said: set[str], record: str, query: str, columns: str, metrics: str) -> str:
    """Return a line for each setting: how many models there are, and means with standard errors.

    Columns that the page has not explained yet are explained below.
    """
    frame, by = _queried(record, query), columns.split()
    each = [metric.partition(" as ") for metric in metrics.split(", ")]
    names = [metric for metric, _, _ in each]
    measured = frame.assign(**{name: verdicts.valued(frame, name) for name in names})
    lines = []
    for setting, rows in measured.groupby(by, sort=True):
        unit = "seed" if "seed" in rows else rows.index
        means = rows.groupby(unit)[names].mean()
        cells = [*map(_cell, setting), str(len(means)), *(shown(means[name]) for name in names)]
        lines.append(cells)
    head = [*map(title, by), "models", *(alias or title(name) for name, _, alias in each)]
    new = [name for name in (*by, *names) if name in COLUMNS and name not in said]
    said.update(new)
    return markdown(head, lines) + (f"\n\n*{explained(new)}*" if new else "")


def value(record: str, query: str, metric: str) -> str:
    """Return the mean of a metric over models."""
    frame = _queried(record, query)
    each = frame.assign(metric=verdicts.valued(frame, metric))
    return shown(each.groupby("seed")["metric"].mean() if "seed" in each else each["metric"])


def _queried(record: str, query: str) -> pd.DataFrame:
    frame = verdicts.read(RESULTS / f"{record}.csv")
    rows = frame if query == "all" else verdicts.chosen(frame, query)
    if rows.empty:
        raise ValueError(f"no row of {record} has {query}")
    return rows


def _cell(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,g}" if number and value < 1e6 else str(value)


def published(query: str) -> str:
    """Return published numbers, a line a setting and source."""
    frame = verdicts.chosen(verdicts.read(RESULTS / "published.csv"), query)
    frame = frame.assign(text=[_with_error(row) for _, row in frame.iterrows()])
    metrics = list(dict.fromkeys(frame["metric"]))
    by = ["setting", "unroll_steps", "source"]
    found = frame.groupby(by, sort=False)
    lines = []
    for (setting, k, source), rows in found:
        texts = dict(zip(rows["metric"], rows["text"], strict=True))
        lines.append([setting, str(k), *(texts.get(metric, "") for metric in metrics), source])
    return markdown(["published", "K", *map(title, metrics), "source"], lines)


def _with_error(row: pd.Series) -> str:
    return f"{row['value']:g}" + (f" ± {row['error']:g}" if pd.notna(row["error"]) else "")


@cache
def _all_claims() -> Mapping[str, Sequence[Claim]]:
    found: dict[str, list[Claim]] = {}
    for claim in verdicts.claims(PAGES / "claims.toml"):
        found.setdefault(claim.page, []).append(claim)
    return found


@cache
def judged(page: str) -> Mapping[str, Sequence[Part]]:
    """Return the parts of the claims of a page by name."""
    return verdicts.judged(_all_claims()[page], RESULTS)


def claims(page: str) -> str:
    """Return the claims of a page, a line a part, with their verdicts."""
    lines = []
    for claim in _all_claims()[page]:
        parts = judged(page)[claim.name]
        words = f"“{claim.quote}”" if claim.quote else f"{claim.says}."
        note = f" ({claim.note})" if claim.note else ""
        first = f"{words} *{claim.source}*{note}", f"**{verdicts.verdict(parts)}**"
        if not parts:
            lines.append([first[0], *[""] * 7, first[1]])
        for number, part in enumerate(parts):
            text, verdict = first if number == 0 else ("", "")
            lines.append([text, part.text, *_numbers(part), verdict])
    head = ["claim", "compared", "models", "values", "effect [95 %]", "p, Holm", "p, ranks"]
    return markdown([*head, "finding", "verdict"], lines)


def _numbers(part: Part) -> list[str]:
    low, high = part.interval
    models = (
        f"{min(part.counts)}" if len(set(part.counts)) == 1 else "/".join(map(str, part.counts))
    )
    ranks = f"{part.rank_p:.2g}" if part.kind != "share" else ""
    effect = f"{part.effect:.3g} [{low:.3g}, {high:.3g}]"
    return [models, part.values, effect, f"{part.p:.2g}", ranks, part.finding]


def verdict(page: str, name: str) -> str:
    """Return the verdict on a claim of a page, or of another one, named as `page/name`."""
    *other, name = name.split("/")
    return verdicts.verdict(judged(*other or [page])[name])


def experiments() -> str:
    """Return a table of the pages that judge claims: what is asked, and the verdicts."""
    lines = []
    for page in _all_claims():
        text = (PAGES / f"{page}.md").read_text()
        head = re.search(r"^# (.*)$", text, re.MULTILINE)
        command = re.search(r"python examples/\S+", text)
        assert head and command, page
        found = [verdicts.verdict(parts).partition(":")[0] for parts in judged(page).values()]
        counts = {word: found.count(word) for word in verdicts.VERDICTS}
        summary = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        lines.append([f"[{head[1]}]({page}.md)", f"`{command[0]}`", summary])
    return markdown(["experiment", "command", "claims"], lines)


def filled(path: Path) -> str:
    """Return the text of a page with what follows from the records written anew."""
    renderers: Mapping[str, Callable[..., str]] = {
        "table": partial(table, set()),
        "value": value,
        "published": published,
        "claims": partial(claims, path.stem),
        "verdict": partial(verdict, path.stem),
        "experiments": experiments,
        "results": lambda name: benchmarks.TABLES[name](),
    }

    def written(block: re.Match[str]) -> str:
        kind, what = block["kind"], block["what"] or ""
        if kind not in renderers:
            return block[0]
        arguments = [part.strip() for part in what.split("|")] if what else []
        try:
            text = renderers[kind](*arguments)
        except Exception as error:
            raise ValueError(f"{path.name}, {kind}: {what}: {error}") from error
        start = block[0].partition("-->")[0] + "-->"
        return f"{start}{text}<!-- end -->" if kind in INLINE else f"{start}\n{text}\n<!-- end -->"

    text = path.read_text()
    if len(START.findall(text)) != len(BLOCK.findall(text)):
        raise ValueError(f"{path.name} has a directive without an <!-- end -->")
    return BLOCK.sub(written, text)


def all_pages() -> list[Path]:
    """Return every page that may have directives."""
    return [DOCS.parent / "README.md", *sorted(DOCS.glob("**/*.md"))]
