"""What the README, the site and the package say of each other."""

import re
from pathlib import Path

import pytest

import unroll

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
SITE, SOURCE = (re.findall(f'{name} = "(.*)"', PROJECT)[0] for name in ("Documentation", "Source"))
RAW = SOURCE.replace("github.com", "raw.githubusercontent.com") + "/main/"


def test_the_readme_has_absolute_links_to_what_there_is() -> None:
    """It is shown on the package's index, too, where a relative link leads nowhere."""
    targets = re.findall(r"^\[[\w-]+\]: (\S+)", README, re.MULTILINE)
    targets += re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(targets) > 10
    for target in targets:
        assert target.startswith(("https://", "#")), target
        if target.startswith(SITE) and target != SITE:
            page = target.removeprefix(SITE).replace(".html", ".md")
            assert (ROOT / "docs" / page).exists(), target
        for base in (RAW, f"{SOURCE}/blob/main/"):
            if target.startswith(base):
                assert (ROOT / target.removeprefix(base)).exists(), target


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/index.md"])
def test_the_placeholder_of_the_address_is_the_same_everywhere(name: str) -> None:
    owner = SOURCE.split("/")[3]
    found = re.findall(r"([\w-]+)\.github\.io/unroll", (ROOT / name).read_text())
    found += re.findall(r"github(?:usercontent)?\.com/([\w-]+)/unroll\b", (ROOT / name).read_text())
    assert found
    assert set(found) == {owner}


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    assert f"version: {unroll.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {unroll.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "unroll").glob("_[!_]*"):
        assert f"`{path.name}" in page, path.name
