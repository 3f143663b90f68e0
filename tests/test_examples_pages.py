"""The verdicts follow one rule, and the pages say what the records do."""

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(name="verdicts")
def _verdicts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("docs.tables.verdicts")


LOW, HIGH = [0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.5, 13.0]


def test_a_part_is_for_its_claim_where_both_tests_find_the_difference(verdicts: Any) -> None:
    part = verdicts.compared("", HIGH, LOW)
    welch = stats.ttest_ind(HIGH, LOW, equal_var=False)
    assert part.p == pytest.approx(welch.pvalue)
    assert part.interval == pytest.approx(tuple(welch.confidence_interval()))
    assert part.rank_p == pytest.approx(2 / math.comb(8, 4))
    assert (part.effect, part.finding) == (10.125, "for")
    assert verdicts.compared("", LOW, HIGH).finding == "against"
    assert verdicts.compared("", LOW, HIGH, smaller=True).finding == "for"
    assert verdicts.compared("", LOW, [0.5, 1.0, 2.0, 3.5]).finding == "undecided"


def test_one_stray_model_does_not_decide(verdicts: Any) -> None:
    stray = verdicts.compared("", [1.0, 1.1, 0.9, 1.0, 1.05], [1.0, 1.02, 0.98, 1.01, -90.0])
    assert stray.finding == "undecided"


def test_three_models_are_too_few_and_short_runs_and_poor_samples_do_not_judge(
    verdicts: Any,
) -> None:
    assert verdicts.compared("", HIGH[:3], LOW[:3]).finding == "too few"
    assert verdicts.compared("", HIGH, LOW, short=True).finding == "too short"
    assert verdicts.compared("", HIGH, LOW, blurred=True).finding == "too poor"
    assert verdicts.compared("", LOW, HIGH, blurred=True).finding == "against"


def test_models_without_spread_are_told_apart_for_certain(verdicts: Any) -> None:
    one, other = [8.0] * 5, [0.0] * 5
    assert (verdicts.compared("", one, other).p, verdicts.compared("", one, one).p) == (0, 1)
    assert verdicts.compared("", one, other).finding == "for"


@pytest.mark.parametrize(
    ("kind", "high", "finding"),
    [
        ("alike", [0.1, 1.0, 2.1, 3.0], "for"),
        ("alike", HIGH, "against"),
        ("alike", [2.0, 3.0, 4.5, 5.0], "undecided"),
        ("not greater", [0.1, 1.0, 2.1, 3.0], "for"),
        ("not greater", [-9.0, -8.0, -7.5, -9.1], "for"),
        ("not greater", HIGH, "against"),
    ],
)
def test_claims_of_no_difference_need_a_margin(
    verdicts: Any, kind: str, high: list[float], finding: str
) -> None:
    low = [0.0, 1.1, 2.0, 3.1]
    assert verdicts.compared("", high, low, kind=kind, margin=3.0).finding == finding


def test_counts_and_trends(verdicts: Any) -> None:
    assert verdicts.counted("", [True] * 10).finding == "for"
    assert verdicts.counted("", [False] * 10).finding == "against"
    assert verdicts.counted("", [True] * 5).finding == "too few"  # p is 1/16
    assert verdicts.counted("", [True] * 6).finding == "for"
    x, y = [0, 0, 1, 1, 3, 3], [0.0, 0.1, 1.0, 1.1, 2.0, 2.1]
    rising = verdicts.trend("", x, y, smaller=False)
    assert rising.effect == pytest.approx(1.0)
    assert rising.finding == "for"
    assert verdicts.trend("", x, y, smaller=True).finding == "against"


def test_holm_corrects_over_the_parts_that_are_judged(verdicts: Any) -> None:
    def part(p: float, *, short: bool = False) -> Any:
        return verdicts.Part("", "", (5, 5), 1.0, (0.5, 1.5), p, 0.01, short=short)

    parts = [part(0.03), part(0.01), part(0.04), part(1e-9, short=True)]
    found = [p.p for p in verdicts.corrected(parts)]
    assert found == pytest.approx([0.06, 0.03, 0.06, 1e-9])


def test_the_verdict_counts_the_findings(verdicts: Any) -> None:
    def part(finding: str) -> Any:
        effect = -1.0 if finding == "against" else 1.0
        p = 0.5 if finding == "undecided" else 0.001
        few = (3, 3) if finding == "too few" else (5, 5)
        how = {"short": finding == "too short", "blurred": finding == "too poor"}
        return verdicts.Part("", "", few, effect, (0.0, 0.0), p, p, **how)

    for findings, verdict in {
        ("for", "for"): "supported",
        ("for", "against", "against"): "partly supported",
        ("against", "against", "undecided"): "refuted",
        ("against", "undecided", "undecided"): "inconclusive",
        ("too few", "too few", "undecided"): "inconclusive: too few models",
        ("too short",): "inconclusive: too short",
        ("too poor", "too poor", "for"): "partly supported",
        ("too poor", "too poor", "undecided"): "inconclusive: samples too poor",
        (): "inconclusive: not run",
    }.items():
        assert verdicts.verdict([part(f) for f in findings]) == verdict


def record(tmp_path: Path, **columns: list[Any]) -> Path:
    pd.DataFrame(columns).to_csv(tmp_path / "record.csv", index=False)
    return tmp_path


def test_a_claim_is_judged_over_models_not_over_rows(verdicts: Any, tmp_path: Path) -> None:
    seeds, ks = [*range(4)] * 4, [0] * 8 + [5] * 8
    metric = [0.0, 1.0, 2.0, 3.0] * 2 + [*HIGH, *HIGH]
    folder = record(tmp_path, seed=seeds, unroll_steps=ks, m=metric, pairs=[10] * 16, lr=[0.1] * 16)
    arms = ["", "unroll_steps == 5", "unroll_steps == 0"]
    claim = verdicts.Claim("p", "n", "s", "record", "m", [arms])
    (part,) = claim.judged(folder)
    assert part.counts == (4, 4)
    assert part.finding == "for"
    less = [["", f"{arms[1]} less {arms[2]}", f"{arms[2]} less {arms[2]}"]]
    assert verdicts.Claim("p", "n", "s", "record", "m", less).judged(folder)[0].effect == 10.125
    for training, finding in ((1.0, "for"), (1.1, "too short")):  # 10 pairs at 0.1
        claim = verdicts.Claim("p", "n", "s", "record", "m", [arms], training=training)
        assert claim.judged(folder)[0].finding == finding
    for least, finding in ((11.0, "for"), (12.0, "too poor")):  # the mean is 11.6
        claim = verdicts.Claim("p", "n", "s", "record", "m", [arms], quality=("m", least))
        assert claim.judged(folder)[0].finding == finding
    for least, finding in ((11.0, "for"), (12.0, "too poor")):  # of those with most steps
        how = {"kind": "trend", "quality": ("m", least), "where": "pairs == 10"}
        claim = verdicts.Claim("p", "n", "s", "record", "m", [["", "unroll_steps"]], **how)
        assert claim.judged(folder)[0].finding == finding
    assert verdicts.Claim("p", "n", "s", "other", "m", [arms]).judged(folder) == []


def test_numbers_have_the_digits_of_their_errors(verdicts: Any) -> None:
    assert verdicts.shown([0.031, 0.033]) == "0.0320 ± 0.0010"
    assert verdicts.shown([100.0, 180.0]) == "140 ± 40"
    assert verdicts.shown([8.0, 8.0]) == "8"
    assert verdicts.shown([0.25]) == "0.25"
    assert verdicts.shown([math.nan, 1.0]) == "n/a"


def test_the_pages_follow_from_the_records() -> None:
    command = [sys.executable, "-m", "docs.tables", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert checked.returncode == 0, checked.stderr


def test_a_page_is_filled_and_faults_are_named(verdicts: Any, tmp_path: Path) -> None:
    del verdicts  # for the path alone
    pages = importlib.import_module("docs.tables.pages")
    page = tmp_path / "page.md"
    query = "preset == 'quick' and unroll_steps == 10"
    page.write_text(f"K: <!-- value: mog | {query} | unroll_steps -->old<!-- end -->.")
    assert "-->10<!-- end -->." in pages.filled(page)
    for text, message in (
        ("<!-- value: mog | seed == 99 | modes --><!-- end -->", "no row of mog has seed == 99"),
        ("<!-- value: mog | seed == 0 | modes -->", "a directive without an <!-- end -->"),
        ("<!-- verdict: none --><!-- end -->", "verdict: none"),
    ):
        page.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            pages.filled(page)


def test_a_page_gives_the_verdict_of_another_one(verdicts: Any) -> None:
    assert verdicts
    pages = importlib.import_module("docs.tables.pages")
    assert pages.verdict("README", "lstm/rotates") == pages.verdict("lstm", "rotates")
    with pytest.raises(KeyError):
        pages.verdict("lstm", "stacked-mnist/rotates")


def test_every_figure_of_a_page_exists_and_every_page_is_linked() -> None:
    folder = ROOT / "docs" / "experiments"
    index = (folder / "README.md").read_text()
    for page in folder.glob("*.md"):
        for figure in re.findall(r"\]\((\.\./figures/[^)]+)\)", page.read_text()):
            assert (folder / figure).exists(), f"{page.name}: {figure}"
        assert page.name == "README.md" or f"({page.name})" in index
