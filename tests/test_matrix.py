"""The command behind docs/results/correctness.md: it measures, it fails, it goes on."""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import matrix
from tests.zoo import ZOO
from tests.zoo_refused import REFUSED
from unroll import UnrolledGeneratorLoss


@pytest.mark.parametrize("optimizer", ["adam", "MetaSGD", "FuncOptimizer adam", "torch amsgrad"])
@pytest.mark.parametrize("discriminator", ["tanh", "frozen backbone", "dropout"])
def test_an_exact_cell(optimizer: str, discriminator: str) -> None:
    row = matrix.cell(optimizer, discriminator)
    assert float(row["relative_error"]) < 1e-8, row
    assert not matrix.wrong(row)


def test_a_refused_cell() -> None:
    row = matrix.cell("torch Adam", "fused layer")
    assert (row["relative_error"], row["refusal"]) == ("", "RuntimeError")
    assert not matrix.wrong(row)


def test_a_lost_second_term_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    first_order = partial(UnrolledGeneratorLoss, stop_gradient=True)
    monkeypatch.setattr(matrix, "UnrolledGeneratorLoss", first_order)
    row = matrix.cell("torch SGD", "tanh")
    assert float(row["relative_error"]) > 1e-3
    assert matrix.wrong(row)


def test_another_exception_than_the_refusal_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matrix.DISCRIMINATORS, "scripted", REFUSED["traced"])
    assert not matrix.wrong(matrix.cell("torch SGD", "scripted"))
    broken = replace(ZOO["tanh"], feed=lambda _: None)
    monkeypatch.setitem(matrix.DISCRIMINATORS, "scripted", broken)
    assert matrix.wrong(matrix.cell("torch SGD", "scripted"))


def test_a_discriminator_that_should_be_refused_and_is_not_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(matrix.DISCRIMINATORS, "fused layer", ZOO["tanh"])
    assert matrix.wrong(matrix.cell("torch SGD", "fused layer"))


def test_parity_is_measured() -> None:
    assert not matrix.inexact(matrix.optimizer_row("SGD momentum"))
    assert matrix.optimizer_row("torch.optim.LBFGS")["refusal"] == "TypeError"
    exact = {"float32": "5.0e-07", "float64": "5.0e-13", "refusal": ""}
    assert not matrix.inexact(exact)
    for worse in ({"float32": "2.0e-06"}, {"float64": "2.0e-12"}, {"float64": "nan"}):
        assert matrix.inexact(exact | worse)


def test_a_record_goes_on_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_same", lambda revision: revision != "another")
    wanted = [("a",), ("b",), ("ab",)]

    def record(only: str = "") -> matrix.Record:
        return matrix.Record(
            tmp_path / "record.csv", ("name",), wanted, lambda row: row["value"] == "wrong", only
        )

    first = record()
    first.extend([{"name": "ab", "value": "1"}])
    first.extend([{"name": "a", "value": "2"}])
    again = record()
    assert [row["name"] for row in again.rows] == ["a", "ab"]
    assert again.missing == [("b",)]
    repeated = record("a")
    assert repeated.missing == [("a",), ("ab",)]
    assert repeated.rows == []
    again.extend([{"name": "b", "value": "wrong"}])
    assert record().missing == [("b",)]
    again.versions |= {"revision": "another"}
    again.rows.pop(1)
    again.extend([{"name": "b", "value": "3"}])
    assert record().missing == [("b",)]
    again.rows[1]["revision"] = again.rows[0]["revision"]
    again.extend([])
    assert record().missing == []


def test_versions_of_torch_are_on_record_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record() -> matrix.Record:
        return matrix.Record(tmp_path / "record.csv", ("name",), [("a",)], lambda _: False)

    def versions() -> list[str]:
        with (tmp_path / "record.csv").open(newline="") as file:
            return [row["torch"] for row in csv.DictReader(file)]

    monkeypatch.setattr(matrix, "_same", lambda _: True)
    for version in ("2.7.0", "2.14.1+cu130", "2.13.0+cpu"):
        monkeypatch.setattr(torch, "__version__", version)
        assert record().missing == [("a",)]
        record().extend([{"name": "a"}])
        assert record().missing == []
    assert versions() == ["2.14.1+cu130", "2.13.0+cpu", "2.7.0"]
    again = record()
    again.rows.clear()
    again.extend([{"name": "a"}])
    assert versions() == ["2.14.1+cu130", "2.13.0+cpu", "2.7.0"]


def test_rows_of_another_library_or_of_changed_sources_do_not_count() -> None:
    assert matrix._same("HEAD")
    assert not matrix._same("HEAD+")
    assert not matrix._same("0000000000")


def test_every_recorded_cell_is_exact_or_refused_by_name() -> None:
    with (matrix.RESULTS / "correctness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [row for row in rows if matrix.wrong(row)]
    assert {row["optimizer"] for row in rows} >= {"torch Adam", "torch SGD", "adam"}
    assert len({row["discriminator"] for row in rows}) >= 140
    with (matrix.RESULTS / "optimizers.csv").open(newline="") as file:
        assert not [row for row in csv.DictReader(file) if matrix.inexact(row)]
