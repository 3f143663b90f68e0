"""Write the tables of the README from the records in docs/results/.

python examples/tables.py            rewrite them
python examples/tables.py --check    fail if one does not follow from its records
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, str]


def mean(rows: Sequence[Row], column: str) -> str:
    """Return "mean ± standard error" of a column over the seeds."""
    values = [float(row[column]) for row in rows]
    if any(map(math.isnan, values)):  # a run without a single high-quality sample
        return "n/a"
    average = sum(values) / len(values)
    digits = 4 if "kl" in column else 2
    if len(values) == 1:
        return f"{average:.{digits}f}"
    variance = sum((value - average) ** 2 for value in values) / (len(values) - 1)
    return f"{average:.{digits}f} ± {math.sqrt(variance / len(values)):.{digits}f}"


def mog(rows: Sequence[Row]) -> str:
    """Return the mixture of Gaussians by preset, length and K."""
    lines = [
        "| preset | pairs | K | seeds with 8 of 8 | modes | % high quality | reverse KL, HQ | "
        "reverse KL, all | rotations | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    settings = sorted({(r["preset"], int(r["pairs"]), int(r["unroll_steps"])) for r in rows})
    for preset, pairs, k in settings:
        key = (preset, str(pairs), str(k))
        seeds = [r for r in rows if (r["preset"], r["pairs"], r["unroll_steps"]) == key]
        full = sum(row["modes"] == "8" for row in seeds)
        columns = ("modes", "percent_high_quality", "reverse_kl_high_quality", "reverse_kl_all")
        cells = [mean(seeds, column) for column in (*columns, "rotations")]
        seconds = f"{median(float(row['seconds']) for row in seeds):.0f}"
        first = [preset, f"{pairs:,}", str(k), f"{full} / {len(seeds)}"]
        lines.append(f"| {' | '.join([*first, *cells, seconds])} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {"mog": mog}


def filled(text: str) -> str:
    """Return a page with the table after every `<!-- results: NAME -->` written anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- results: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if found:
            _, closed, after = rest.partition(end)
            if not closed:
                raise ValueError(f"a page has no {end} after {start.strip()}")
            with (ROOT / "docs" / "results" / f"{name}.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            text = f"{before}{start}{table(rows)}\n{end}{after}"
    return text


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]:
        text = page.read_text()
        if filled(text) == text:
            continue
        if check:
            sys.exit(f"{page.relative_to(ROOT)}: run python examples/tables.py")
        page.write_text(filled(text))


if __name__ == "__main__":
    main()
