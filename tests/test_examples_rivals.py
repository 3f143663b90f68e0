"""The rivals of unrolling are the methods that they are named after, and what pages say of them."""

import copy
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unroll
from tests.test_examples import example, rows, run

real_rand = torch.rand
METHODS = ["GAN", "PacGAN2", "grad-norm", "WGAN-GP 0.1", "RpGAN+R1+R2 1"]


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("mog_rivals", monkeypatch)


def halves(*shape: Any, **options: Any) -> torch.Tensor:
    """Stand in for the draws from the global generator alone."""
    return real_rand(*shape, **options) if "generator" in options else torch.full(shape, 0.5)


def trained(
    rivals: Any, folder: Path, *lengths: int, method: str, seeds: int, first: int
) -> dict[str, Any]:
    """Train a method to each length, resuming, and return its checkpoint."""
    for number, pairs in enumerate(lengths):
        config = replace(
            rivals.PRESETS["quick"],
            method=method,
            unroll_steps=2,
            evaluate_every=2,
            pairs=pairs,
            seeds=seeds,
            first_seed=first,
        )
        rivals.train(config, 0, folder=folder, resume=number > 0)
    content: dict[str, Any] = torch.load(config.checkpoint(folder), weights_only=True)
    return content


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_trains_among_others_as_it_does_alone(
    rivals: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # WGAN-GP draws its points for all seeds at once: other ones where others train beside.
    monkeypatch.setattr(torch, "rand", halves)
    torch.set_default_dtype(torch.float64)
    try:
        together = trained(rivals, tmp_path / "three", 2, method=method, seeds=3, first=0)["parts"]
        alone = trained(rivals, tmp_path / "one", 2, method=method, seeds=1, first=1)["parts"]
    finally:
        torch.set_default_dtype(torch.float32)
    for part in "gd":
        for key, parameters in alone[part].items():
            others = together[part][key]
            assert (parameters[0] - others[1]).abs().max() < 1e-9, key
            if "weight" in key:
                assert (parameters[0] - others[0]).abs().max() > 1e-4, f"{key}: one for all seeds"


@pytest.mark.parametrize("method", ["WGAN-GP 10", "PacGAN2"])
def test_they_resume_to_the_same_numbers(rivals: Any, method: str, tmp_path: Path) -> None:
    once = trained(rivals, tmp_path / "once", 5, method=method, seeds=2, first=0)
    again = trained(rivals, tmp_path / "again", 3, 5, method=method, seeds=2, first=0)
    for part in "gd":
        for key, parameters in once["parts"][part].items():
            assert torch.equal(parameters, again["parts"][part][key])
    seconds = [row["cpu_seconds"] for row in again["log"]["history"]]
    assert seconds == sorted(seconds)


def test_packs_are_samples_of_one_seed(rivals: Any) -> None:
    seeds = importlib.import_module("lab.seeds")
    config = replace(rivals.PRESETS["quick"], width=4, seeds=3)
    d = rivals.Discriminators(config, 2, seeds.Generators(range(3), "cpu"))
    x = torch.randn(3 * 10, 2, requires_grad=True)
    logits = d(x)
    assert logits.shape == (15,)
    (gradient,) = torch.autograd.grad(logits[6], x)  # the second pack of the second seed
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [12, 13]


def test_the_gradient_norm_is_a_step_of_sgd_to_first_order(rivals: Any) -> None:
    torch.manual_seed(0)
    d = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    before = copy.deepcopy(d.state_dict())
    x, y = torch.randn(2, 16, 2, dtype=torch.double)
    y.requires_grad_()
    eta = 1e-5

    def surrogate(steps: int) -> unroll.UnrolledGeneratorLoss:
        optimizer = torch.optim.SGD(d.parameters(), lr=eta)
        return unroll.UnrolledGeneratorLoss(d, optimizer, unroll.Minimax(), unroll_steps=steps)

    (alone,) = torch.autograd.grad(surrogate(0)(y, x), y)
    (ahead,) = torch.autograd.grad(surrogate(1)(y, x), y)
    (term,) = torch.autograd.grad(rivals.regularised(surrogate(0), y, x, eta), y)
    assert (term - ahead).abs().max() < 1e-3 * (ahead - alone).abs().max()
    assert all(torch.equal(before[name], p) for name, p in d.state_dict().items())
    assert all(p.grad is None for p in d.parameters())

    (both,) = torch.autograd.grad(rivals.regularised(surrogate(1), y, x, eta), y)
    (two,) = torch.autograd.grad(surrogate(2)(y, x), y)
    assert (both - two).abs().max() < 1e-3 * (two - ahead).abs().max()


@pytest.mark.parametrize(
    "arguments",
    [("--unroll-steps", "-1"), ("--iterations", "0"), ("--methods", "no"), ("--data", "no"),
     ("--learning-rate", "0")],
)  # fmt: skip
def test_bad_arguments_are_refused_before_any_work(
    rivals: Any,
    arguments: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["mog_rivals.py", *arguments, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as refused:
        rivals.main()
    assert refused.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(argument in error for argument in arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_line_records_a_row_a_seed_and_draws(tmp_path: Path) -> None:
    record = tmp_path / "record.csv"
    command = ("--iterations", "2", "--seeds", "2", "--unroll-steps", "0", "1", "--workers", "1")
    methods = ("--methods", "GAN", "WGAN-GP 10", "--data", "ring")
    outcome = run(
        "mog_rivals.py", *command, *methods, "--out", tmp_path / "out", "--record", record
    )
    assert outcome.returncode == 0, outcome.stderr
    found = sorted((row["method"], row["unroll_steps"], row["seed"]) for row in rows(record))
    assert found == [(m, k, s) for m in ("GAN", "WGAN-GP 10") for k in "01" for s in "01"]
    updates = {row["method"]: row["player_updates"] for row in rows(record)}
    assert updates == {"GAN": "4", "WGAN-GP 10": "12"}  # the second has five critic steps
    for name in ("mog_rivals_ring.png", "mog_rivals_costs.png", "metrics.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 0
