"""The comparison of two revisions sees a difference."""

import shutil
from pathlib import Path

import pytest

from tests.verification.differential import ROOT, both, differences, work


def test_two_revisions_are_compared_with_each_other(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "unroll", tmp_path / "unroll")
    planted = tmp_path / "unroll" / "_objectives.py"
    text = planted.read_text()
    assert "return -self.discriminator_loss(" in text
    planted.write_text(
        text.replace("return -self.discriminator_loss(", "return -2 * self.discriminator_loss(")
    )
    found = both(["tanh"], ["stop_gradient"], [tmp_path, ROOT])
    cells = {difference.cell for difference in found if difference.what == "first f_K"}
    assert len(cells) > 40
    assert all(float(d.size) == pytest.approx(0.5) for d in found if d.what == "first f_K")
    assert {d.what for d in found} == {
        "first f_K",
        "second f_K",
        "first gradient",
        "second gradient",
    }


def test_a_revision_that_is_not_the_imported_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the worker imported"):
        work(["tanh"], [], tmp_path, tmp_path / "found.pt")


def test_long_words_keep_both_sides() -> None:
    (found,) = differences(("tanh",), {"words": 400 * "a"}, {})
    assert found.size.endswith("-> None")
