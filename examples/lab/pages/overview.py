"""The experiments of the pages at a glance: what they say of each, read from their own text."""

import re
from collections.abc import Iterable, Mapping

from lab.pages.claims import HEAD, NOT_CONTRADICTED, NOT_SEEN, TOO_EARLY, TOO_FEW, table

COUNTED = {
    "holds": "hold",
    "partly": "partly",
    NOT_CONTRADICTED: "not contradicted",
    NOT_SEEN: "not seen",
    "does not hold": "do not",
    TOO_FEW: "too few runs",
    TOO_EARLY: "too early",
    "none": "not run",
}


def experiments(pages: Mapping[str, str]) -> str:
    """Return a table of the sections that judge claims.

    Args:
        pages: The text of each page by its address: sections with a title, a command that runs
            them again, and claims.
    """
    lines = [line for address, page in pages.items() for line in _sections(page, address)]
    return table(("experiment", "command", "claims"), lines)


def _sections(page: str, address: str) -> Iterable[tuple[str, str, str]]:
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        command = re.search(r"`(python examples/[^`]+)`", section)
        verdicts = list(_verdicts(section.splitlines()))
        if command and verdicts:
            link = f"[{title}]({address}#{_anchor(title)})"
            yield link, f"`{' '.join(command[1].split())}`", _counted(verdicts)


def _verdicts(lines: Iterable[str]) -> Iterable[str]:
    inside = False
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if tuple(cells) == HEAD:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and cells[-1] != "---":
            yield cells[-1].strip("*")


def _counted(verdicts: list[str]) -> str:
    counts = {word: verdicts.count(verdict) for verdict, word in COUNTED.items()}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def _anchor(title: str) -> str:
    """Return the name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
