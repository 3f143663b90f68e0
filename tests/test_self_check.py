"""``check_gradients`` accuses no innocent: its verdicts, what it names, and code of one type."""

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unroll
from tests.players import fakes, tanh_net
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from tests.test_state import LeCam
from tests.verification.planted import Game, Wrong, mlp
from tests.verification.self_check import answer, cases, failures
from unroll._diagnostics.central import COARSE, ROUNDED, Line, compare

Loss = unroll.UnrolledGeneratorLoss
CRITERION = nn.BCEWithLogitsLoss()


def batch(samples: int = 8) -> Tensor:
    return torch.randn(samples, 3, device=DEVICE)


def sgd(d: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(d.parameters(), lr=0.1)


def adam(d: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(d.parameters(), lr=1e-2)


def trained(d: nn.Module) -> torch.optim.Optimizer:
    optimizer = adam(d)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(unroll.Minimax().discriminator_loss(d, batch(), batch()))
        optimizer.step()
    return optimizer


def checked(d: nn.Module, optimizer: Any, game: Any, **options: Any) -> unroll.GradientReport:
    loss = Loss(d, optimizer, game, **{"unroll_steps": 3, **options})
    return unroll.check_gradients(loss, batch(), batch())


# One slope against its differences.


class _Claimed(torch.autograd.Function):
    """A function with any slope that it is told to have."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None


def verdict(
    f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], x: float = 0.7
) -> tuple[str, tuple[str, ...]]:
    """Return what is said of a function and its slope, at a point and in a direction of 1."""
    point = torch.tensor([x], dtype=torch.float64, requires_grad=True)

    def function() -> Tensor:
        at = point.detach()
        return _Claimed.apply(point, f(at), slope(at)).sum()  # type: ignore[no-any-return]

    found = compare(Line(function, [point], [torch.ones_like(point)]))
    return found.verdict, found.suspicions


def _sign_like(x: Tensor) -> Tensor:
    """A fresh Adam's first step, for a gradient that is small here."""
    return (x - 0.7 + 2e-6) / ((x - 0.7 + 2e-6).abs() + 1e-5)


def _sign_like_slope(x: Tensor) -> Tensor:
    return 1e-5 / ((x - 0.7 + 2e-6).abs() + 1e-5).square()


def _coarse(x: Tensor) -> Tensor:
    return 1e3 + x.float().double()


SLOPES: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "smooth": ("right", torch.sin, torch.cos),
    "smooth, off by 1e-7": ("right", torch.sin, lambda x: x.cos() * (1 + 1e-7)),
    "smooth, off by 1e-4": ("wrong", torch.sin, lambda x: x.cos() * (1 + 1e-4)),
    "smooth, small beside its value": (
        "right", lambda x: 0.65 + 1e-8 * (36 * x).sin(), lambda x: 36e-8 * (36 * x).cos()
    ),
    "lost beside its value": (
        "inconclusive", lambda x: 1 + 1e-12 * x.sin(), lambda x: 1e-12 * x.cos()
    ),
    "sign-like": ("right", _sign_like, _sign_like_slope),
    "sign-like, off by 1e-2": ("wrong", _sign_like, lambda x: 1.01 * _sign_like_slope(x)),
    "a kink here": ("inconclusive", lambda x: (x - 0.7).abs(), lambda x: 1 + 0 * x),
    "a kink near": (
        "right", lambda x: x + (x - 0.7 - 1e-6).relu(), lambda x: 1 + (x > 0.7 + 1e-6).double()
    ),
    "a kink near, wrong": ("wrong", lambda x: x + (x - 0.7 - 1e-6).relu(), lambda x: 2 + 0 * x),
    "a step finer than all": (
        "inconclusive",
        lambda x: x + 1e-10 * (x - 0.7) / ((x - 0.7).abs() + 1e-13),
        lambda x: 1 + 1e-23 / ((x - 0.7).abs() + 1e-13).square(),
    ),
    "rounded to float32": ("inconclusive", _coarse, lambda x: 1 + 0 * x),
    "constant": ("right", lambda x: 1 + 0 * x, lambda x: 0 * x),
    "constant, a slope of 1": ("wrong", lambda x: 1 + 0 * x, lambda x: 1 + 0 * x),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOPES)
def test_a_slope_against_its_differences(name: str) -> None:
    wanted, f, slope = SLOPES[name]
    found, words = verdict(f, slope)
    assert found == wanted
    reason = ROUNDED if name == "lost beside its value" else COARSE
    assert words == ((reason,) if found == "inconclusive" else ())


# Innocents.


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fresh_adam_is_right(seed: int) -> None:
    torch.manual_seed(seed)
    d = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(256, 1),
    ).to(DEVICE)  # fmt: skip
    loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-3), unroll_steps=3)
    images = torch.randn(2, 8, 3, 16, 16, device=DEVICE)
    report = unroll.check_gradients(loss, images[0], images[1])
    assert report.verdict == "right", report
    assert report.relative_error < 1e-5


@pytest.mark.parametrize("build", [sgd, adam, trained])
def test_a_bias_without_a_gradient_is_right(build: Any) -> None:
    """Of the head of every Wasserstein and relativistic game."""
    for game in (unroll.Wasserstein(), unroll.RelativisticPairing()):
        d = mlp(nn.ReLU(inplace=True))
        assert checked(d, build(d), game).verdict == "right"


class Relativistic:
    """Its only fault is the detach."""

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        return F.softplus(d(fake) - d(real)).mean()

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        return F.softplus(d(real).detach() - d(fake)).mean()


@pytest.mark.parametrize("build", [sgd, trained])
@pytest.mark.parametrize(
    "make",
    [
        mlp,
        lambda: mlp(nn.ReLU(inplace=True)),
    ],
    ids=["tanh", "in-place ReLU"],
)
def test_only_the_objective_is_named(make: Callable[[], nn.Module], build: Any) -> None:
    d = make()
    report = checked(d, build(d), Relativistic())
    assert report.verdict == "wrong"
    assert report.suspicions == (
        "the objective: its own operations have a wrong derivative (does it detach, use .data or "
        "a straight-through estimator, or change D's mode between its two losses, so that one "
        "reads the statistics that the other has moved?)",
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_a_forward_pass_has_left_behind_is_no_coarser_operation() -> None:
    class Detached(unroll.Hinge):
        def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            difference: Tensor = d(fake).mean() - d(real).mean().detach()
            return difference.square()

    d = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 1))
    loss = unroll.UnrolledGeneratorLoss(d, sgd(d), Detached(), unroll_steps=2)
    report = unroll.check_gradients(loss, torch.randn(8, 3), torch.randn(8, 3))
    assert report.verdict == "wrong"
    assert "does it detach" in report.suspicions[0]


def test_modes_that_the_objective_changes_are_named() -> None:
    class InTwoModes(unroll.NonSaturating):
        def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            d.train()
            return super().discriminator_loss(d, fake, real)

        def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            d.eval()
            return super().generator_loss(d, fake, real)

    d = mlp(nn.BatchNorm1d(8))
    report = checked(d, sgd(d), InTwoModes())
    assert report.verdict == "wrong"
    assert "change D's mode between its two losses" in report.suspicions[0]


def test_only_the_guilty_layer_is_named() -> None:
    d = mlp(nn.ReLU(inplace=True), nn.Linear(8, 8), Wrong(), nn.LeakyReLU(inplace=True))
    report = checked(d, sgd(d), unroll.Wasserstein())
    assert report.verdict == "wrong"
    assert [s.split(" (rel")[0] for s in report.suspicions] == [
        "wrong second derivative of layer 3 (Wrong)"
    ]


class Gated(nn.Module):
    """It detaches in its own forward, beside statistics that no training step reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(x))
        output: Tensor = self.head(x * x.detach().sigmoid())
        return output


def test_statistics_are_not_named() -> None:
    d = Gated().to(DEVICE)
    report = checked(d, sgd(d), unroll.Minimax())
    assert report.verdict == "wrong"
    (words,) = report.suspicions
    assert words.startswith("wrong first derivative of layer itself (Gated)")
    assert "running_mean" not in words
    assert words.endswith("gradient reversal, where meant, is one here, too")


# Code that was written for float32.


class Casting(nn.Module):
    """It casts, asserts a type and names types."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.get_buffer("scale")
        assert scale.dtype == torch.float32
        x = x.float() * scale.to(torch.float32)
        shift = torch.zeros(len(x), 3, dtype=torch.float32, device=x.device)
        output: Tensor = self.layer(x.to(x.dtype) + shift).tanh()
        return output


ONES = torch.ones(8, 1, device=DEVICE)
WEIGHTS = torch.full((3, 1), 0.3, device=DEVICE)


def _labels() -> Any:
    zeros, average = torch.zeros(8, 1, device=DEVICE), torch.zeros((), device=DEVICE)

    def discriminator_loss(d: Any, fake: Any, real: Any, ones: Tensor = 0.9 * ONES) -> Tensor:
        average.mul_(0.9).add_(real.mean())
        on_both = CRITERION(d(real), ones) + CRITERION(d(fake), zeros)
        loss: Tensor = on_both + average.clone() * (fake @ WEIGHTS).square().mean() * d(fake).mean()
        return loss

    game = Game(discriminator_loss=discriminator_loss)
    game.generator_loss = lambda d, fake, _: CRITERION(d(fake), ONES)
    return game, average


def test_code_of_one_type_runs_in_double() -> None:
    d = Casting().to(DEVICE)
    assert checked(d, adam(d), unroll.Minimax()).relative_error < 1e-6
    assert checked(d, adam(d), unroll.Minimax()).verdict == "right"


def test_closures_globals_and_defaults_are_read_in_double_and_left_alone() -> None:
    d, (game, average) = mlp(), _labels()
    held = [d, average, ONES, WEIGHTS]
    before = snapshot(held)
    report = checked(d, adam(d), game)
    assert report.verdict == "right", report
    assert report.relative_error < 1e-6
    assert not changes(before, held)


class _ThroughNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return torch.from_numpy(x.cpu().numpy().astype(np.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0]


def test_what_rounds_all_the_same_is_named() -> None:
    d, game = mlp(), unroll.Minimax()
    rounding = Game(
        generator_loss=lambda d, fake, real: (
            1e3 + _ThroughNumpy.apply(1e3 + game.generator_loss(d, fake, real))
        )
    )
    report = checked(d, sgd(d), rounding)
    assert report.verdict == "inconclusive"
    assert "_ThroughNumpyBackward of D or the objective return a coarser" in report.suspicions[0]


def test_code_that_fails_in_double_alone_is_an_error_that_says_so() -> None:
    d = mlp()

    def generator_loss(d: Any, fake: Tensor, _: Any) -> Tensor:
        if fake.cpu().detach().numpy().dtype != np.float32:
            raise RuntimeError("a kernel for float32 only")
        loss: Tensor = d(fake).mean()
        return loss

    with pytest.raises(
        TypeError,
        match=r"loss: .*float64.*though not in its own type.*a kernel for float32 only.*Let it",
    ):
        checked(d, sgd(d), Game(generator_loss=generator_loss))


# Random numbers, and what cannot be told.


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x * (1 + random.random()) + np.random.rand()).tanh()
        return output


def test_random_numbers_of_numpy_and_python_are_replayed() -> None:
    d = Drawing().to(DEVICE)
    before = random.getstate(), repr(np.random.get_state())
    assert checked(d, sgd(d), unroll.Minimax()).verdict == "right"
    assert (random.getstate(), repr(np.random.get_state())) == before


def test_a_gradient_that_is_zero_tells_nothing() -> None:
    d = mlp(nn.ReLU())
    with torch.no_grad():
        d.get_parameter("0.bias").fill_(-100.0)
    report = checked(d, sgd(d), unroll.Hinge())
    assert report.verdict == "inconclusive"
    assert "f_K does not change with the fakes" in report.suspicions[0]


# The command.

SAMPLE = [
    ("right", "tanh", "SGD", "gradients"),
    ("right", "BatchNorm1d", "trained Adam", "step"),
    ("wrong", "half the loss", "fresh Adam", "step"),
    ("wrong", "a detached norm in a projection", "trained Adam", "gradients"),
    ("wrong", "a wrong third derivative under a penalty", "SGD", "gradients"),
    ("wrong", "a spectral norm by hand", "SGD", "gradients"),
]


def test_a_sample_of_the_command() -> None:
    assert set(SAMPLE) <= set(cases())
    rows = [answer(case) for case in SAMPLE]
    assert not failures(rows)
    assert [row["verdict"] for row in rows] == [
        "right",
        "right",
        "wrong",
        "wrong",
        "wrong",
        "wrong",
    ]


def test_layers_that_are_not_registered_are_refused() -> None:
    assert not failures([answer(("wrong", "unregistered layers", "SGD", "gradients"))])


def test_the_command_fails_where_a_check_does() -> None:
    row = answer(SAMPLE[0])
    for change, text in (
        ({"verdict": "wrong"}, "tanh, SGD"),
        ({"verdict": "inconclusive", "words": "why"}, "tanh, SGD"),
        ({"verdict": "wrong", "optimizer": "fresh Adam", "words": "why"}, "fresh Adam"),
        ({"verdict": "inconclusive", "optimizer": "fresh Adam"}, "fresh Adam"),
        ({"verdict": "inconclusive", "optimizer": "trained Adam", "words": "why"}, "0 of 1"),
        ({"expected": "wrong"}, "tanh, SGD"),
        ({"expected": "wrong", "verdict": "wrong", "named": "False"}, "tanh, SGD"),
    ):
        (found,) = failures([row | change])
        assert text in found


class WithNets(nn.Module):
    """An objective that is a module, holds others in a list, and points back at itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.nets = nn.Linear(1, 3), [nn.Linear(3, 2)]
        self.register_buffer("weight", torch.ones(2, 1))
        self.owner = {"me": [self]}
        self.to(DEVICE)
        self.nets[0].to(DEVICE)

    def judged(self, d: Any, x: Any) -> Tensor:
        w = self.get_buffer("weight")
        output: Tensor = (self.nets[0](self.net(d(x))) @ w).tanh().mean()
        return output

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        return self.judged(d, fake) - self.judged(d, real)

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        return -self.judged(d, fake)


def test_the_self_check_takes_objectives_with_modules_lists_and_cycles() -> None:
    d, own = tanh_net().float(), WithNets()
    loss = Loss(d, torch.optim.Adam(d.parameters(), lr=0.05), own, unroll_steps=2)
    before = snapshot(d, own)
    report = unroll.check_gradients(loss, fakes().float(), randn(5, 3).float())
    assert report.ok, report.suspicions
    assert not changes(before, d, own)


def test_the_self_check_leaves_what_hangs_on_a_function() -> None:
    def clip(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        width: Any = vars(clip)["width"]
        return {name: p.clamp(-width, width) for name, p in theta.items()}

    vars(clip)["width"] = torch.tensor(0.4, device=DEVICE)
    d = tanh_net().float()
    loss = Loss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2, project=clip)
    assert unroll.check_gradients(loss, fakes().float(), randn(5, 3).float()).ok
    assert vars(clip)["width"].dtype == torch.float32


def test_the_self_check_names_what_it_cannot_copy() -> None:
    d, own = tanh_net(), LeCam()
    vars(own)["lock"] = threading.Lock()
    loss = Loss(d, torch.optim.Adam(d.parameters(), lr=0.05), own, unroll_steps=1)
    loss(fakes(), randn(5, 3)).backward()
    with pytest.raises(
        TypeError, match=r"objective: must be what copy\.deepcopy can copy.*Keep locks"
    ):
        unroll.check_gradients(loss, fakes(), randn(5, 3))


def test_the_self_check_reads_casts_as_float64() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.to(DEVICE)

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.layer.weight.float(), self.layer.bias.float()
            return nn.functional.linear(x.float(), weight, bias).tanh()

    d = Casting()
    assert unroll.check_gradients(
        Loss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=1), fakes(), randn(5, 3)
    ).ok


def test_the_self_check_takes_minibatches_without_a_length() -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                yield randn(5, 3), randn(5, 3)

        def __len__(self) -> int:
            raise TypeError("no length")

    d = tanh_net()
    loss = Loss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2)
    assert unroll.check_gradients(loss, fakes(), randn(5, 3), minibatches=Stream()).ok


def test_a_saturated_discriminator_is_said_to_be_too_sure_to_check() -> None:
    d = tanh_net()
    head = d[2]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias.fill_(-20.0)
    report = unroll.check_gradients(
        Loss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=3), fakes(), randn(5, 3)
    )
    assert not report.ok
    assert report.verdict == "inconclusive"
    assert "round-off of f_K" in report.suspicions[0]


class Faint:
    """A game whose generator's loss is far larger than its slope, which is a little wrong."""

    def discriminator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        return unroll.Minimax().discriminator_loss(discriminator, fake, real)

    def generator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        loss: Tensor = discriminator(fake).mean()
        return 1.0 + 1e-4 * (loss + 1e-3 * loss.detach())


def test_a_wrong_gradient_does_not_hide_in_the_round_off_of_small_steps() -> None:
    d = tanh_net()
    report = unroll.check_gradients(
        Loss(d, torch.optim.SGD(d.parameters(), lr=0.3), Faint(), unroll_steps=2),
        fakes(),
        randn(5, 3),
    )
    assert not report.ok
    assert report.relative_error > 1e-4
