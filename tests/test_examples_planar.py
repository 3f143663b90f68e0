"""The planar experiments: side by side as alone, resumed to the same numbers, recorded, refused."""

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unroll
from tests.examples import command, example, refused, rows, same, trained

SMALL = {"batch_size": 16, "samples": 30, "evaluate_every": 2}
ARMS: list[tuple[str, dict[str, Any]]] = [
    ("mog", {"unroll_steps": 2, "half_life": 2}),
    ("mog", {"unroll_steps": 1, "resample": True, "discriminator_steps": 2}),
    ("mog", {"unroll_steps": 1, "activation": "tanh", "discriminator_layers": 2}),
    ("mog_history", {"members": 3, "delay": 2}),
    ("mog_history", {"members": 3, "delay": 2, "live": False}),
    ("mog_history", {"unroll_steps": 2}),
    ("mog_second_gradient", {"unroll_steps": 2, "generator_steps": 2}),
    ("mog_second_gradient", {"unroll_steps": 2, "stop_gradient": True, "average": True}),
    ("mog_nonuniform", {"unroll_steps": 2, "weight_deviation": 0.06}),
    ("five_gaussians", {"unroll_steps": 2, "normalise": True}),
    ("mog_rivals", {"unroll_steps": 1, "method": "PacGAN2"}),
    ("mog_rivals", {"unroll_steps": 1, "method": "grad-norm"}),
    ("mog_rivals", {"unroll_steps": 1, "method": "WGAN-GP 10"}),
    ("two_clusters", {"unroll_steps": 2, "game": "Rp", "start": "collapsed"}),
]


def settings(name: str, arm: dict[str, Any], **more: Any) -> dict[str, Any]:
    small = {"evaluate_every": 2} if name == "two_clusters" else SMALL
    return {**small, **arm, **more}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example("two_clusters"), "ALONE", 5)


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_an_arm_resumes_to_the_same_numbers(name: str, arm: dict[str, Any], tmp_path: Path) -> None:
    own = settings(name, arm, seeds=2)
    once = trained(name, tmp_path / "once", 5, **own)
    same(once, trained(name, tmp_path / "again", 3, 5, **own))


real_rand = torch.rand


def halves(*shape: Any, **options: Any) -> torch.Tensor:
    """Stand in for the draws from the global generator alone, which differ in number."""
    return real_rand(*shape, **options) if "generator" in options else torch.full(shape, 0.5)


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_a_seed_trains_among_others_as_it_does_alone(
    name: str, arm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", halves)
    torch.set_default_dtype(torch.float64)
    try:
        three = trained(name, tmp_path / "three", 3, **settings(name, arm, seeds=3))
        own = settings(name, arm, seeds=1, first_seed=1)
        one = trained(name, tmp_path / "one", 3, **own)
    finally:
        torch.set_default_dtype(torch.float32)
    for part in "gd":
        for key, parameters in one["parts"][part].items():
            others = three["parts"][part][key]
            assert (parameters[0] - others[1]).abs().max() < 1e-6, key
            if "weight" in key:
                assert (parameters[0] - others[0]).abs().max() > 1e-4, f"{key}: one for all seeds"
    alone, among = (c["log"]["history"][-1]["each"] for c in (one, three))
    for metric, value in alone[0].items():
        assert among[1][metric] == pytest.approx(value, rel=1e-3, nan_ok=True), metric


def test_the_rates_fall_by_their_half_life(tmp_path: Path) -> None:
    found = trained("mog", tmp_path, 4, **settings("mog", {"half_life": 2}))
    for adam in ("g_adam", "d_adam"):
        assert found["parts"][adam]["param_groups"][0]["lr"] == pytest.approx(1e-4 / 4)


COMMANDS: list[tuple[str, tuple[object, ...], str, list[tuple[str, ...]], list[str]]] = [
    (
        "mog",
        ("--preset", "quick", "--unroll-steps", 0, 1, "--pairs", 3, "--samples", 30,
         "--mixture", "grid"),
        "mog_seeds",
        [("0", "grid"), ("1", "grid")],
        ["mog_seeds_quick_grid.png", "mog_seeds_quick_grid_seeds.png", "training.gif"],
    ),
    (
        "mog",
        ("--preset", "quick", "--compare", "real-steps", "--unroll-steps", 2, "--pairs", 2,
         "--samples", 30),
        "mog_dsteps",
        [("0", "1"), ("0", "2"), ("2", "1")],
        ["mog_seeds_quick_fig2_curves.png"],
    ),
    (
        "mog_history",
        ("--members", 1, 5, "--delay", 3, "--unroll-steps", 1, "--pairs", 2),
        "mog_history",
        [("0", "1", "1", "True"), ("0", "5", "1", "True"), ("0", "5", "3", "False"),
         ("0", "5", "3", "True"), ("1", "1", "1", "True")],
        ["mog_history_ensembles.png", "mog_history_delays.png", "mog_history_sampled.png"],
    ),
    (
        "mog_second_gradient",
        ("--unroll-steps", 1, "--pairs", 6),
        "mog_second_gradient",
        [(steps, stop, average) for steps in "15" for stop, average in
         (("False", "False"), ("True", "False"), ("True", "True"))],
        ["mog_second_gradient_1_full.png", "mog_second_gradient_5_averaged_curves.png"],
    ),
    (
        "mog_nonuniform",
        ("--unroll-steps", 0, 1, "--weight-deviation", 0.06, "--pairs", 2),
        "mog_nonuniform",
        [("0", "False"), ("1", "False"), ("1", "True")],
        ["mog_nonuniform_relu_0.06.png"],
    ),
    (
        "five_gaussians",
        ("--unroll-steps", 0, "--pairs", 2),
        "five_gaussians",
        [("JS", "16"), ("Rp", "16")],
        ["five_gaussians_16_curves.png"],
    ),
    (
        "mog_rivals",
        ("--method", "GAN", "WGAN-GP 10", "--mixture", "ring", "--unroll-steps", 0, "--pairs", 2),
        "mog_rivals",
        [("GAN", "4"), ("WGAN-GP 10", "12")],  # the second has five critic steps
        ["mog_rivals_ring.png", "mog_rivals_costs.png"],
    ),
    (
        "two_clusters",
        ("--epochs", 2, "--unroll-steps", 0),
        "two_clusters",
        [("JS", "0"), ("Rp", "0")],
        ["two_clusters_loss.png", "two_clusters_data.png"],
    ),
]  # fmt: skip
VARIED = {
    "mog_seeds": ("unroll_steps", "mixture"),
    "mog_dsteps": ("unroll_steps", "discriminator_steps"),
    "mog_history": ("unroll_steps", "members", "delay", "live"),
    "mog_second_gradient": ("generator_steps", "stop_gradient", "average"),
    "mog_nonuniform": ("unroll_steps", "stop_gradient"),
    "five_gaussians": ("game", "width"),
    "mog_rivals": ("method", "player_updates"),
    "two_clusters": ("game", "unroll_steps"),
}


@pytest.mark.parametrize(("name", "arguments", "record", "arms", "figures"), COMMANDS)
def test_a_command_records_a_row_a_model_and_draws(
    name: str,
    arguments: tuple[object, ...],
    record: str,
    arms: list[tuple[str, ...]],
    figures: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(command(name, tmp_path, *arguments, "--seeds", 2, "--record"))
    found = rows(tmp_path / f"{record}.csv")
    settings = [tuple(row[column] for column in VARIED[record]) for row in found]
    assert sorted(settings) == sorted(arm for arm in arms for _ in range(2))
    kept = Path(__file__).resolve().parents[1] / "docs" / "results" / f"{record}.csv"
    columns = set(kept.read_text().partition("\n")[0].split(","))
    assert columns - {"seconds", "cpu_seconds"} == found[0].keys()  # rows of both are of one kind
    for figure in figures:
        assert (out / figure).stat().st_size > 0
    said = capsys.readouterr().out
    assert "Preset quick: " in said
    assert said.splitlines()[-1].startswith("Figures, time series and checkpoints are in ")
    assert {row["seed"] for row in rows(out / "metrics.csv")} == {"0", "1"}


def test_nothing_is_overwritten_without_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> None:
        small = ("--samples", 30, "--unroll-steps", 0, "--evaluate-every", 2)
        command("mog", tmp_path, *small, *arguments)

    run("--pairs", 4)
    for arguments, message in (
        ((), "--out must not hold the run already"),
        (("--resume", "--beta1", 0.4), "cannot be resumed, it has beta1 0.5, not 0.4"),
    ):
        with pytest.raises(SystemExit):
            run("--pairs", 4, *arguments)
        assert message in capsys.readouterr().err
    run("--pairs", 6, "--resume")
    run("--pairs", 2, "--force")
    assert [row["pairs"] for row in rows(tmp_path / "out" / "metrics.csv")] == ["0", "2"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mog", ("--unroll-steps", "-1")),
        ("mog", ("--pairs", "0")),
        ("mog", ("--seeds", "0")),
        ("mog", ("--mixture", "no")),
        ("mog", ("--preset", "no")),
        ("mog", ("--device", "no")),
        ("mog_history", ("--members", "0")),
        ("mog_second_gradient", ("--generator-steps", "0")),
        ("mog_nonuniform", ("--weight-deviation", "0.5")),
        ("five_gaussians", ("--width", "0")),
        ("mog_rivals", ("--learning-rate", "0")),
        ("two_clusters", ("--epochs", "0")),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    name: str, arguments: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(name, tmp_path, capsys, *arguments)
    assert arguments[1].removesuffix(".0") in error
    assert arguments[0].lstrip("-") in error


def test_the_time_of_a_run_is_that_of_the_runs_on_record_that_are_most_like_it(
    tmp_path: Path,
) -> None:
    record = tmp_path / "mog_seeds.csv"
    head = "preset,unroll_steps,width,batch_size,pairs,seeds_together,seconds"
    like = ("paper,10,128,512,100,2,60", "paper,10,128,512,100,10,200")
    other = ("paper,10,128,64,100,2,1", "paper,0,128,512,100,2,1")
    record.write_text("\n".join([head, *like, *other]))
    study, paper = example("lab.study"), example("mog").PRESETS["paper"]
    for seeds, pairs, seconds, about in (
        (1, 100, 60, "at most 1 min"),  # two models on record
        (2, 800, 480, "about 8 min"),
        (9, 300, 600, "at most 10 min"),
        (20, 100, 400, "about 7 min"),
    ):
        config = replace(paper, seeds=seeds, pairs=pairs)
        assert study._seconds(config, record) == (seconds, about.startswith("at most"))
        assert about in study._start_line([config], study.Options(workers=1), record)
    line = study._start_line([config], study.Options(workers=1), record)
    assert "about 7 min on 1 core, measured in docs/results/mog_seeds.csv" in line
    config = replace(paper, batch_size=7)
    line = study._start_line([config], study.Options(), record)
    assert "no time on record" in line


def test_the_help_says_where_values_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("mog").main(arguments=["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for text in ("Appendix A, K = 0 and K = 10", "--generator-learning-rate", "begin anew where"):
        assert text in said


def test_the_plateaus_of_two_clusters_are_the_best_losses_at_a_collapsed_state() -> None:
    two_clusters = example("two_clusters")
    for name, game in two_clusters.GAMES.items():
        values = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # f at each cluster
        optimizer = torch.optim.Adam([values], lr=0.1)
        where = torch.tensor([0, 1]).repeat(50)  # of the real samples, by turns
        for _ in range(1000):
            loss = game.discriminator_loss(lambda i, f=values: f[i], torch.zeros_like(where), where)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert abs(loss.item() - two_clusters.PLATEAU[name]) < 1e-3
    assert round(two_clusters.PLATEAU["JS"], 4) == 0.4774


def test_two_clusters_tells_collapsed_from_covered() -> None:
    clusters = example("two_clusters")
    history: list[dict[str, int]] = []
    for first, second, loss in (
        (95, 0, 0.47), (95, 0, 0.6), (90, 1, 0.4774), (40, 25, 0.69), (100, 0, 0.48)
    ):  # fmt: skip
        places = [0.2] * first + [4.2] * second + [2.0] * (100 - first - second)
        row = {"d_loss": loss, **clusters.counts(torch.tensor([places]))}
        history.append(clusters.landmarks(10 * len(history), row, history, "JS"))
    assert [row["collapsed"] for row in history] == [1, 2, 2, 2, 3]
    assert [row["on_plateau"] for row in history] == [1, 1, 1, 1, 2]
    assert [row["covers"] for row in history] == [0, 0, 0, 1, 0]
    assert [row["covered_at"] for row in history] == [-1, -1, -1, 30, 30]


def test_the_weights_have_the_deviations_that_they_are_named_by() -> None:
    mog_nonuniform = example("mog_nonuniform")
    for deviation in mog_nonuniform.WEIGHTS:
        weights = torch.tensor(mog_nonuniform.weights(deviation))
        assert abs(weights.sum().item() - 1) < 1e-6
        assert abs(weights.std(unbiased=False).item() - deviation) < 5e-4


def test_the_grid_has_25_modes_at_even_distances() -> None:
    mixture = example("lab.data.mixtures").grid(radius=4.0, deviation=0.05)
    assert len({tuple(mean.tolist()) for mean in mixture.means}) == 25
    assert sorted(set(mixture.means.flatten().tolist())) == [-4, -2, 0, 2, 4]


def test_the_normalised_layer_is_the_last_of_d() -> None:
    five_gaussians, seeds = example("five_gaussians"), example("lab.seeds")
    rngs = seeds.Generators([0, 1], "cpu")
    d = seeds.perceptrons([2, 8, 8, 1], "leaky_relu", rngs, last_bias=False)
    names = [name for name, _ in d.named_parameters()]
    assert names[-1] == five_gaussians.LAST
    normalised = five_gaussians.normalised(dict(d.named_parameters()))
    assert torch.allclose(normalised[names[-1]].norm(dim=-1), torch.ones(2, 1))
    assert all(normalised[name] is p for name, p in d.named_parameters() if name != names[-1])


def test_an_ensemble_holds_the_discriminators_that_it_says() -> None:
    mog_history, seeds = example("mog_history"), example("lab.seeds")
    network = seeds.perceptrons([2, 1], "relu", seeds.Generators([0, 1], "cpu"))
    x = torch.ones(2, 2, 3)

    def held(updates: int, **settings: Any) -> list[int]:
        """Return after which updates the members were taken."""
        ensemble = mog_history.Ensemble(network, **settings)
        for update in range(updates):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.fill_(update)
            ensemble.follow()
        logits = ensemble(x).reshape(len(ensemble), 2, 3)
        assert (logits == logits[:, :1, :1]).all()
        return sorted((logits[:, 0, 0] / 3).int().tolist())

    assert held(1, members=3, delay=1) == [0]
    assert held(5, members=3, delay=1) == [2, 3, 4]
    assert held(5, members=3, delay=1, live=False) == [2, 3, 4]
    assert held(6, members=2, delay=3) == [2, 5]
    assert held(8, members=2, delay=3) == [5, 7]
    assert held(8, members=2, delay=3, live=False) == [3, 6]
    assert held(2, members=2, delay=3, live=False) == [0]


def test_late_metrics_are_means_over_the_last_third() -> None:
    planar, mog_history = example("lab.planar"), example("mog_history")
    history = [
        {
            "pairs": n,
            "each": [dict.fromkeys(planar.LATE, float(n * seed)) for seed in (1, 2)],
            "seconds": float(n),
        }
        for n in (0, 2, 4, 5, 6)
    ]
    log = {"history": history, "provenance": {"revision": "none"}}
    config = replace(mog_history.PRESETS["quick"], pairs=6, seeds=2)
    found = planar.late_rows("name", config, log)
    assert [row["late_modes"] for row in found] == [5.0, 10.0]
    assert [row["modes"] for row in found] == [6.0, 12.0]
    assert [row["seed"] for row in found] == [0, 1]
    assert [row["seconds"] for row in found] == [6.0, 6.0]  # of both models


def test_packs_are_samples_of_one_seed() -> None:
    rivals, seeds = example("mog_rivals"), importlib.import_module("lab.seeds")
    config = replace(rivals.PRESETS["quick"], width=4, seeds=3)
    d = rivals.Discriminators(config, 2, seeds.Generators(range(3), "cpu"))
    x = torch.randn(3 * 10, 2, requires_grad=True)
    logits = d(x)
    assert logits.shape == (15,)
    (gradient,) = torch.autograd.grad(logits[6], x)  # the second pack of the second seed
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [12, 13]


def test_the_gradient_norm_is_a_step_of_sgd_to_first_order() -> None:
    rivals = example("mog_rivals")
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
    (both,) = torch.autograd.grad(rivals.regularised(surrogate(1), y, x, eta), y)
    (two,) = torch.autograd.grad(surrogate(2)(y, x), y)
    assert (both - two).abs().max() < 1e-3 * (two - ahead).abs().max()
    assert all(torch.equal(before[name], p) for name, p in d.state_dict().items())
    assert all(p.grad is None for p in d.parameters())
