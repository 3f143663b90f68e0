"""Pages that are made of sections, each written from its record."""

from collections.abc import Callable, Sequence
from pathlib import Path

Section = Callable[[Path], str]  # given the folder of the records; "" where its record is missing


def page(introduction: str, sections: Sequence[Section], results: Path) -> str:
    """Return a page, or "" where no section has a record yet."""
    written = [text for section in sections if (text := section(results))]
    return "\n".join([introduction, *written]) if written else ""
