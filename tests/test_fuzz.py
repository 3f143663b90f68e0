"""Random games against the naive loop; ``python -m tests.fuzz`` plays more of them."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from tests import fuzz, games
from tests.composite import FUNCTIONS, LEAVES
from tests.fuzz import Case, cases, check
from unroll import _autograd_fixes as derivatives
from unroll._functional import Functional
from unroll._optimizers import torch_optim

Patch = pytest.MonkeyPatch


@pytest.mark.filterwarnings("ignore:optimizer. holds no")
@settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(cases())
def test_random_games(case: Case) -> None:
    check(case)


EVERYTHING = Case(
    block=("then", ("linear",), ("layer norm",)),
    optimizer="torch Adam decay",
    objective="minimax+r1",
    average=True,
    resampled=True,
    real_in_graph=True,
    warm=1,
    project="shrink",
)


@pytest.mark.parametrize(
    "optimizer", [name for name in games.OPTIMIZERS if name in fuzz.OPTIMIZERS]
)
def test_every_optimizer(optimizer: str) -> None:
    assert check(replace(EVERYTHING, optimizer=optimizer)).kind == "compared"


@pytest.mark.parametrize("layer", LEAVES)
@pytest.mark.parametrize("objective", ["least_squares", "wasserstein+gp"])
def test_every_layer(layer: str, objective: str) -> None:
    block = ("then", ("linear",), (layer,))
    case = Case(block=block, optimizer="torch Adam decay", objective=objective, warm=1)
    assert check(case).kind == "compared"


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_that_are_spelled_out_have_the_layers_slope_at_zero(
    kind: type[nn.Module],
) -> None:
    layer = nn.LeakyReLU(0.2) if kind is nn.LeakyReLU else kind()
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    slopes = [torch.autograd.grad(f(x).sum(), x)[0].item() for f in (layer, FUNCTIONS[kind])]
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-15)


# What random games have found: logits beyond 20, in the look-ahead or in the real steps before it.
SATURATED = [
    Case(
        block=("concatenation", ("attention",), ("attention",)),
        optimizer="torch RMSprop momentum",
        objective="minimax+r1",
        fakes=3,
        reals=5,
        frozen="head",
        warm=3,
        seed=298,
    ),
    Case(
        block=("twice", ("concatenation", ("group norm",), ("spectral norm, hooks",))),
        optimizer="torch Adam decay",
        objective="pairing",
        unroll_steps=4,
        resampled=True,
        real_in_graph=True,
        warm=3,
        project="shrink",
        evaluated=True,
        seed=497,
    ),
]


@pytest.mark.parametrize("case", SATURATED)
def test_saturated_games(case: Case) -> None:
    check(case)


def test_softplus_in_d_is_the_layers_own() -> None:
    """Spectral norm's u and v are those of before the clip, which makes logits of 70."""
    check(
        Case(
            block=(
                "then",
                (
                    "then",
                    (
                        "concatenation",
                        ("then", ("spectral norm, hooks",), ("softplus",)),
                        ("twice", ("rms norm",)),
                    ),
                    ("twice", ("batch norm",)),
                ),
                (
                    "residual",
                    ("concatenation", ("spare",), ("then", ("weight norm, conv",), ("tied",))),
                ),
                (
                    "then",
                    ("twice", ("concatenation", ("group norm",), ("attention",))),
                    ("concatenation", ("silu",), ("elu",)),
                ),
            ),
            optimizer="sgd maximize",
            objective="own",
            unroll_steps=1,
            fakes=6,
            reals=4,
            dtype=torch.float64,
            average=True,
            stop_gradient=False,
            resampled=False,
            real_in_graph=True,
            frozen="all",
            part=False,
            warm=0,
            project="clip",
            evaluated=False,
            seed=65536,
        )
    )


def test_a_norm_under_a_penalty_behind_a_layer_that_works_in_place() -> None:
    """It was refused once, by an error of the search for its name."""
    check(Case(("twice", ("then", ("relu, in place",), ("batch norm",))), objective="minimax+r1"))


@pytest.mark.parametrize("objective", ["minimax+r1", "wasserstein+gp"])
def test_a_penalty_on_attention_without_a_second_term(objective: str) -> None:
    check(Case(("attention",), objective=objective, stop_gradient=True))


# --- the fuzz sees what it is there to see --------------------------------------------------------


def _without_replacements(patch: Patch) -> None:
    for function in list(derivatives._TWICE):
        patch.delitem(derivatives._TWICE, function)


def _without_safe_roots(patch: Patch) -> None:
    patch.setattr(derivatives, "safe_sqrt", torch.sqrt)
    patch.setitem(derivatives._ROOT, torch.sqrt, torch.sqrt)


def _without_second_term(patch: Patch) -> None:
    step = torch_optim.TorchOptim.step

    def detached(self: Any, theta: Any, gradients: dict[str, Tensor], *rest: Any) -> Any:
        return step(self, theta, {n: g.detach() for n, g in gradients.items()}, *rest)

    patch.setattr(torch_optim.TorchOptim, "step", detached)


def _with_buffers_standing_still(patch: Patch) -> None:
    call = Functional.__call__

    def forgetful(self: Any, function: Any, theta: Any, buffers: Any) -> Any:
        return call(self, function, theta, buffers)[0], dict(buffers)

    patch.setattr(Functional, "__call__", forgetful)


def _with_a_gradient_left_in_d(patch: Patch) -> None:
    call = Functional.__call__

    def leaving(self: Any, *args: Any) -> Any:
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        return call(self, *args)

    patch.setattr(Functional, "__call__", leaving)


DEAD = Case(("then", ("relu",), ("relu",)), optimizer="adam", fakes=1, reals=1, warm=1)
BROKEN: dict[str, tuple[Callable[[Patch], None], Case]] = {
    "weight norm": (_without_replacements, Case(("weight norm",))),
    "layer norm's third derivative": (
        _without_replacements,
        Case(("layer norm",), objective="minimax+r1"),
    ),
    "batch norm's third derivative": (
        _without_replacements,
        Case(("batch norm",), objective="minimax+r1"),
    ),
    "fused attention": (_without_replacements, Case(("attention",))),
    "root": (_without_safe_roots, DEAD),
    "second term": (_without_second_term, Case(unroll_steps=1)),
    "second term in float32": (_without_second_term, Case(dtype=torch.float32)),
    "buffers": (_with_buffers_standing_still, Case(("averaging",), unroll_steps=1)),
    "mutation": (_with_a_gradient_left_in_d, Case()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_it_sees_what_is_broken(name: str, monkeypatch: Patch) -> None:
    spoil, case = BROKEN[name]
    assert check(case).kind == "compared"
    spoil(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check(case)


def test_the_command_records_what_it_found(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "RECORDS", tmp_path / "fuzz.csv")
    monkeypatch.setattr("sys.argv", ["fuzz", "--examples", "4", "--seed", "3", "--record"])
    assert fuzz.main() == 0
    monkeypatch.setattr(fuzz, "check", lambda _: 1 / 0)
    assert fuzz.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    with fuzz.RECORDS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["examples"] for row in rows] == ["4", "4"]
    assert [row["failures"] for row in rows] == ["0", "4"]
