"""Gradients of f_K against central differences, a naive loop and the identities of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
import torchopt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unroll
from tests import oracles
from tests.games import (
    OBJECTIVES,
    OPTIMIZERS,
    Game,
    convolutional_discriminator,
    normalised_discriminator,
    tanh_discriminator,
)
from tests.players import with_options
from tests.settings import DEVICE, randn

TOLERANCE = 1e-6
STEPS = (0, 1, 2, 5)
DISCRIMINATORS = {
    "tanh": tanh_discriminator,
    "normalised": normalised_discriminator,
    "convolutional": convolutional_discriminator,
}
measured: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _summary(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if not measured:
        return
    worst = max(measured, key=lambda name: measured[name])

    class Summary:
        def pytest_terminal_summary(self, terminalreporter: Any) -> None:
            terminalreporter.write_line(
                f"central differences: {len(measured)} games, relative error at worst "
                f"{measured[worst]:.1e} ({worst})"
            )

    request.config.pluginmanager.register(Summary())


@dataclass(frozen=True)
class Case:
    optimizer: str
    objective: str
    steps: int
    resample: bool = False
    average: bool = False
    stop_gradient: bool = False
    warm: int = 0
    discriminator: str = "tanh"
    seed: int = 0

    def __str__(self) -> str:
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return ", ".join(
            str(v) if n in ("optimizer", "objective") else f"{n}={v}" for n, v in values if v
        )


class Played:
    """A case made real: the loss, and f_K as a function of all of the generator's parameters."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.game = Game(case.seed, DISCRIMINATORS[case.discriminator])
        self.objective = OBJECTIVES[case.objective]
        optimizer = OPTIMIZERS[case.optimizer](self.game.discriminator)
        self.arguments = self.game.warmed(optimizer, case.warm)
        self.loss = unroll.UnrolledGeneratorLoss(
            self.game.discriminator,
            optimizer,
            self.objective,
            unroll_steps=case.steps,
            stop_gradient=case.stop_gradient,
            average=case.average,
        )

    def _arguments(self, theta: Tensor, steps: int) -> dict[str, Any]:
        if not self.case.resample:
            return self.arguments
        return {**self.arguments, "minibatches": self.game.minibatches(theta, steps)}

    def surrogate(self, theta: Tensor) -> Tensor:
        torch.manual_seed(7)
        arguments = self._arguments(theta, self.case.steps)
        value: Tensor = self.loss(self.game.fake(theta), self.game.real[0], **arguments)
        return value

    def held(self) -> Callable[[Tensor], Tensor]:
        """Return f as a function of the generator alone, with theta_D^1..K where they are."""
        game, steps = self.game, self.case.steps
        ahead = []
        for k in range(1 if self.case.average and steps else steps, steps + 1):
            self.loss.unroll_steps = k
            torch.manual_seed(7)
            arguments = self._arguments(game.theta, k)
            ahead.append(self.loss.unroll(game.fake(game.theta), game.real[0], **arguments))

        def f(theta: Tensor) -> Tensor:
            fake, real = game.fake(theta), game.real[0]
            return torch.stack([self.objective.generator_loss(d, fake, real) for d in ahead]).mean()

        return f

    def gradient(self) -> Tensor:
        theta = self.game.theta.clone().requires_grad_()
        value = self.surrogate(theta)
        with torch.no_grad():
            torch.testing.assert_close(self.surrogate(theta), value, rtol=1e-14, atol=0)
        (gradient,) = torch.autograd.grad(value, theta)
        return gradient


def check(case: Case) -> None:
    """Compare a case's gradient with central differences, and keep the record."""
    played = Played(case)
    gradient = played.gradient()
    f = played.held() if case.stop_gradient else played.surrogate
    torch.manual_seed(case.seed + 1)
    record(str(case), oracles.relative_error(f, played.game.theta, gradient))


def record(name: str, error: float) -> None:
    """Keep the record and hold it to the tolerance."""
    measured[name] = error
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


def compare(name: str, surrogate: Callable[[Tensor], Tensor], theta: Tensor) -> None:
    """Compare a surrogate's gradient in ``theta`` with central differences."""
    point = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(point), point)
    record(name, oracles.relative_error(surrogate, theta, gradient))


def covering() -> Iterator[Case]:
    """Yield every optimizer with two objectives and every objective with two optimizers at least.

    K, re-sampling, averaging and warm starts go round on their own, with periods without a common
    divisor, so that their combinations spread.
    """
    objectives, optimizers = list(OBJECTIVES), list(OPTIMIZERS)
    pairs = [
        (optimizer, objectives[(2 * i + shift) % len(objectives)])
        for i, optimizer in enumerate(optimizers)
        for shift in (0, 7)
    ]
    for i, (optimizer, objective) in enumerate(pairs):
        yield Case(
            optimizer,
            objective,
            steps=(1, 5, 2, 2, 1, 5, 0)[i % 7],
            resample=i % 2 == 1,
            average=i % 3 == 2,
            stop_gradient=i % 11 == 10,
            warm=(0, 6, 0, 7, 1)[i % 5],
            discriminator=("tanh", "tanh", "normalised", "convolutional")[i % 4],
            seed=i,
        )


@pytest.mark.parametrize("case", list(covering()), ids=str)
def test_central_differences(case: Case) -> None:
    check(case)


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.builds(
        Case,
        optimizer=st.sampled_from(list(OPTIMIZERS)),
        objective=st.sampled_from(list(OBJECTIVES)),
        steps=st.sampled_from(STEPS),
        resample=st.booleans(),
        average=st.booleans(),
        stop_gradient=st.sampled_from((False, False, True)),
        warm=st.sampled_from((0, 1, 6)),
        discriminator=st.sampled_from(list(DISCRIMINATORS)),
        seed=st.integers(0, 99),
    )
)
def test_central_differences_of_drawn_games(case: Case) -> None:
    check(case)


def test_the_covering_set_covers() -> None:
    cases = list(covering())
    for name in OPTIMIZERS:
        assert len({case.objective for case in cases if case.optimizer == name}) >= 2
    for name in OBJECTIVES:
        assert len({case.optimizer for case in cases if case.objective == name}) >= 2
    kinds = {(case.steps, case.resample, case.average) for case in cases}
    assert kinds == {(k, r, a) for k in STEPS for r in (False, True) for a in (False, True)}
    assert {case.steps for case in cases if case.stop_gradient} >= {1, 2, 5}


class Conditional(nn.Module):
    """A discriminator of samples and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(3, 4)
        self.features = nn.Linear(2, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        features: Tensor = self.features(x).tanh()
        logits: Tensor = (features * self.labels(label)).sum(1)
        return logits


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, label: (x, label),
    "mapping": lambda x, label: {"label": label, "x": x},
}


@pytest.mark.parametrize("objective", ["minimax", "pairing+r1+r2", "wasserstein+gp"])
@pytest.mark.parametrize("form", FORMS)
def test_central_differences_of_a_conditional_game(form: str, objective: str) -> None:
    game = Game(3, Conditional)
    labels = torch.arange(12, device=DEVICE).view(2, 6) % 3
    loss = unroll.UnrolledGeneratorLoss(
        game.discriminator,
        torch.optim.Adam(game.discriminator.parameters(), 0.05),
        OBJECTIVES[objective],
        unroll_steps=2,
    )

    def surrogate(theta: Tensor) -> Tensor:
        torch.manual_seed(7)
        fake, real = FORMS[form](game.fake(theta), labels[0]), FORMS[form](game.real[0], labels[1])
        value: Tensor = loss(fake, real)
        return value

    compare(f"conditional, {form}, {objective}", surrogate, game.theta)


@pytest.mark.parametrize("name", ["sgd momentum", "torch SGD nesterov", "torch Adam", "radam"])
def test_central_differences_through_a_projection(name: str) -> None:
    game = Game(4)
    loss = unroll.UnrolledGeneratorLoss(
        game.discriminator,
        OPTIMIZERS[name](game.discriminator),
        unroll.Wasserstein(),
        unroll_steps=2,
        project=lambda theta: {n: p / (1 + p.square().sum()) for n, p in theta.items()},
    )

    compare(f"projected, {name}", lambda t: loss(game.fake(t), game.real[0]), game.theta)


class Spare(nn.Module):
    """A discriminator with a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tanh_discriminator()
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


@pytest.mark.parametrize(
    "name",
    [
        "sgd momentum",
        "adam",
        "adamax",
        "rmsprop momentum",
        "Optimizer SGD",
        "Optimizer AdamW",
        "MetaSGD",
        "FuncOptimizer sgd",
        "torch SGD momentum",
        "torch AdamW",
    ],
)
@pytest.mark.parametrize("warm", [0, 2])
def test_central_differences_with_unused_parameters(name: str, warm: int) -> None:
    game = Game(4, Spare)
    optimizer = OPTIMIZERS[name](game.discriminator)
    arguments = game.warmed(optimizer, warm)
    loss = unroll.UnrolledGeneratorLoss(game.discriminator, optimizer, unroll_steps=2)

    compare(
        f"unused parameters, {name}, {warm} real steps",
        lambda t: loss(game.fake(t), game.real[0], **arguments),
        game.theta,
    )


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("name", "objective", "average"),
    [
        ("sgd", "minimax", False),
        ("rmsprop momentum", "least_squares", True),
        ("torch Adam", "non_saturating+r2", False),
        ("torch SGD nesterov", "pairing", False),
        ("Optimizer AdamW", "average", True),
    ],
)
def test_gradcheck_in_fake_and_real(name: str, objective: str, average: bool, steps: int) -> None:
    game = Game(5, batch=3)
    optimizer = OPTIMIZERS[name](game.discriminator)
    arguments = game.warmed(optimizer, 3)
    loss = unroll.UnrolledGeneratorLoss(
        game.discriminator,
        optimizer,
        OBJECTIVES[objective],
        unroll_steps=steps,
        average=average,
    )
    fake = game.fake(game.theta).requires_grad_()
    real = game.real[0].requires_grad_()  # an encoder's output, as in a bidirectional GAN

    def surrogate(fake: Tensor, real: Tensor) -> Tensor:
        value: Tensor = loss(fake, real, **arguments)
        return value

    assert torch.autograd.gradcheck(surrogate, (fake, real), eps=1e-5, atol=1e-9, rtol=1e-6)
    if steps:
        assert all(
            g.norm() > 1e-4 for g in torch.autograd.grad(surrogate(fake, real), (fake, real))
        )


# Adam's slope at a single gradient is eps / (|g| + eps)^2: the default eps leaves seven digits.
STEPPERS: dict[str, tuple[Callable[[nn.Module], Any], oracles.Step]] = {
    "torch SGD": (
        lambda d: torch.optim.SGD(d.parameters(), 0.3, momentum=0.8),
        oracles.sgd(0.3, 0.8),
    ),
    "torch SGD nesterov": (
        lambda d: torch.optim.SGD(
            d.parameters(), 0.3, momentum=0.8, weight_decay=0.1, nesterov=True
        ),
        oracles.sgd(0.3, 0.8, decay=0.1, nesterov=True),
    ),
    "torch SGD groups": (
        lambda d: torch.optim.SGD(
            [{"params": [p], "lr": 0.3 / (i + 1)} for i, p in enumerate(d.parameters())]
        ),
        oracles.sgd_in_groups([0.3, 0.15, 0.1]),
    ),
    "torch amsgrad": (
        lambda d: torch.optim.Adam(d.parameters(), 0.1, (0.5, 0.5), eps=0.01, amsgrad=True),
        oracles.adam(0.1, (0.5, 0.5), eps=0.01, amsgrad=True),
    ),
    "torch Adam": (
        lambda d: torch.optim.Adam(d.parameters(), 0.1, (0.5, 0.99), eps=0.01),
        oracles.adam(0.1, (0.5, 0.99), eps=0.01),
    ),
    "torch AdamW": (
        lambda d: torch.optim.AdamW(d.parameters(), 0.1, eps=0.01, weight_decay=0.1),
        oracles.adam(0.1, eps=0.01, decay=0.1),
    ),
    "torchopt nesterov": (
        lambda _: torchopt.sgd(0.3, momentum=0.8, weight_decay=0.1, nesterov=True),
        oracles.sgd(0.3, 0.8, decay=0.1, nesterov=True),
    ),
    "torchopt sgd": (lambda _: torchopt.sgd(0.3, momentum=0.8), oracles.sgd(0.3, 0.8)),
    "torchopt adam": (
        lambda _: torchopt.adam(0.1, (0.5, 0.99), eps=0.01),
        oracles.transformed(torchopt.adam(0.1, (0.5, 0.99), eps=0.01)),
    ),
    "torchopt adadelta": (
        lambda _: torchopt.adadelta(10.0),
        oracles.transformed(torchopt.adadelta(10.0)),
    ),
}


def unbiased_discriminator() -> nn.Module:
    """Return one without an output bias: torchopt's own Adam is NaN at its zero gradient."""
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))


def assert_same(
    left: tuple[Tensor, ...], right: tuple[Tensor, ...], relative: float = 1e-12
) -> None:
    """Compare two sets of tensors; each is measured against its own largest entry."""
    for a, b in zip(left, right, strict=True):
        assert (a - b).abs().max() <= relative * b.abs().max(), (a, b)


def value_and_gradient(value: Tensor, *points: Tensor) -> tuple[Tensor, ...]:
    """Return a value and its gradients, zeros where there are none."""
    gradients = torch.autograd.grad(
        value, points, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return (value.detach(), *gradients)


@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize(
    ("objective", "steps", "resample", "average"),
    [
        ("minimax", 0, False, False),
        ("minimax", 3, False, False),
        ("non_saturating", 1, True, False),
        ("least_squares", 2, True, True),
        ("hinge", 3, False, True),
        ("average", 2, True, False),
        ("pairing+r1+r2", 2, False, False),
        ("own+r1", 5, True, True),
    ],
)
def test_equals_the_naive_loop(
    stepper: str, objective: str, steps: int, resample: bool, average: bool
) -> None:
    game = Game(6, unbiased_discriminator)
    build, step = STEPPERS[stepper]
    game_objective = OBJECTIVES[objective]
    loss = unroll.UnrolledGeneratorLoss(
        game.discriminator,
        build(game.discriminator),
        game_objective,
        unroll_steps=steps,
        average=average,
    )
    theta = game.theta.clone().requires_grad_()
    real = [r.requires_grad_() for r in game.real]
    fake = game.fake(theta)
    pairs = list(game.minibatches(theta, steps)) if resample else [(fake, real[0])] * steps
    ours = loss(fake, real[0], minibatches=pairs if resample else None)
    naive = oracles.naive_surrogate(
        game.discriminator, step, game_objective, fake, real[0], pairs, average=average
    )
    assert_same(
        value_and_gradient(ours, theta, *real[: steps + 1]),
        value_and_gradient(naive, theta, *real[: steps + 1]),
    )
    (total,) = torch.autograd.grad(ours, theta, retain_graph=True)
    assert total.norm() > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", ["tensor", *FORMS])
def test_no_steps_is_the_plain_loss_bit_for_bit(form: str, objective: str) -> None:
    game = Game(7, tanh_discriminator if form == "tensor" else Conditional)
    d, game_objective = game.discriminator, OBJECTIVES[objective]
    labels = torch.arange(6, device=DEVICE) % 3
    batch: Callable[[Tensor, Tensor], Any] = FORMS.get(form, lambda x, _: x)

    def unpacking(x: Any) -> Any:
        if form == "mapping":
            return d(**x)
        return d(*x) if form == "tuple" else d(x)

    fake = game.fake(game.theta).requires_grad_()
    arguments = batch(fake, labels), batch(game.real[0], labels)
    for average in (False, True):
        loss = unroll.UnrolledGeneratorLoss(
            d, torch.optim.Adam(d.parameters()), game_objective, unroll_steps=0, average=average
        )
        ours = value_and_gradient(loss(*arguments), fake)
        plain = value_and_gradient(game_objective.generator_loss(unpacking, *arguments), fake)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        assert plain[1].abs().max() > 0


@pytest.mark.parametrize(
    "build",
    [
        lambda d: torch.optim.SGD(d.parameters(), 0.0, momentum=0.9),
        lambda d: torch.optim.AdamW(d.parameters(), 0.0, weight_decay=0.1),
        lambda _: torchopt.adam(0.0),
        lambda _: torchopt.rmsprop(0.0),
    ],
)
@pytest.mark.parametrize("average", [False, True])
def test_no_inner_learning_rate_is_no_steps(
    build: Callable[[nn.Module], Any], average: bool
) -> None:
    game = Game(8)
    fake = game.fake(game.theta).requires_grad_()
    results = []
    for steps in (0, 4):
        loss = unroll.UnrolledGeneratorLoss(
            game.discriminator, build(game.discriminator), unroll_steps=steps, average=average
        )
        results.append(value_and_gradient(loss(fake, game.real[0]), fake))
    assert_same(results[1], results[0], 1e-15)


def reference(steps: int = 5, **options: Any) -> tuple[unroll.UnrolledGeneratorLoss, Game]:
    """Return the reference game: Adam against a tanh network."""
    game = Game(11)
    optimizer = torch.optim.Adam(game.discriminator.parameters(), 0.3, betas=(0.5, 0.999))
    loss = unroll.UnrolledGeneratorLoss(
        game.discriminator, optimizer, unroll_steps=steps, **options
    )
    return loss, game


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("resample", [False, True])
def test_stop_gradient_is_a_loop_that_detaches(average: bool, resample: bool) -> None:
    loss, game = reference(stop_gradient=True, average=average)
    theta = game.theta.clone().requires_grad_()
    fake, real = game.fake(theta), game.real[0]
    pairs = list(game.minibatches(theta, 5)) if resample else [(fake, real)] * 5
    ours = value_and_gradient(loss(fake, real, minibatches=pairs if resample else None), theta)
    naive, full = (
        oracles.naive_surrogate(
            game.discriminator,
            oracles.adam(0.3, (0.5, 0.999)),
            unroll.Minimax(),
            fake,
            real,
            pairs,
            average=average,
            detach=detach,
        )
        for detach in (True, False)
    )
    assert_same(ours, value_and_gradient(naive, theta))
    value, gradient = value_and_gradient(full, theta)
    assert_same((ours[0],), (value,))
    assert (ours[1] - gradient).norm() > 0.1 * gradient.norm()

    loss = with_options(loss, stop_gradient=False)
    again = value_and_gradient(loss(fake, real, minibatches=pairs if resample else None), theta)
    assert_same(again, (value, gradient))


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_the_two_terms_sum_to_the_whole(steps: int, average: bool, resample: bool) -> None:
    loss, game = reference(steps, average=average)
    parameters = list(game.generator.parameters())
    arguments: dict[str, Any] = {}
    fake, real = game.generator(game.noise[0]), game.real[0]
    pairs = [(game.generator(z), x) for z, x in zip(game.noise, game.real, strict=True)][1:]
    if resample:
        arguments["minibatches"] = pairs[:steps]
    first, second = unroll.gradient_terms(loss, fake, real, parameters, **arguments)
    whole = torch.autograd.grad(loss(fake, real, **arguments), parameters, retain_graph=True)
    assert_same(tuple(a + b for a, b in zip(first, second, strict=True)), whole)
    first_term = with_options(loss, stop_gradient=True)
    stopped = torch.autograd.grad(first_term(fake, real, **arguments), parameters)
    assert_same(first, stopped)
    for term, p in zip(second, parameters, strict=True):
        assert term.shape == p.shape
        assert (term.abs().max() == 0) == (steps == 0)


def test_gradient_terms_takes_the_state_of_a_bare_transformation() -> None:
    game = Game(10)
    optimizer = torchopt.adam(0.1)
    arguments = game.warmed(optimizer, 6)
    loss = unroll.UnrolledGeneratorLoss(game.discriminator, optimizer, unroll_steps=2)
    parameters = list(game.generator.parameters())
    fake, real = game.generator(game.noise[0]), game.real[0]
    terms = unroll.gradient_terms(loss, fake, real, parameters, **arguments)
    whole = torch.autograd.grad(loss(fake, real, **arguments), parameters, retain_graph=True)
    fresh = torch.autograd.grad(loss(fake, real), parameters)
    assert_same(tuple(a + b for a, b in zip(*terms, strict=True)), whole)
    assert any((a - b).norm() > 0.01 * b.norm() for a, b in zip(fresh, whole, strict=True))


def second_share(objective: Any, steps: int) -> float:
    """Return |second term| / |first term| of a game that is concave in D: a linear D."""
    game = Game(11, lambda: nn.Linear(2, 1), batch=32)
    loss = unroll.UnrolledGeneratorLoss(
        game.discriminator,
        torch.optim.SGD(game.discriminator.parameters(), 2.0),
        objective,
        unroll_steps=steps,
    )
    parameters = list(game.generator.parameters())
    fake, real = 2 * game.generator(game.noise[0]), 3 * game.real[0] - 2.5
    first, second = unroll.gradient_terms(loss, fake, real, parameters)
    norms = [torch.cat([t.flatten() for t in term]).norm().item() for term in (first, second)]
    return float(norms[1] / norms[0])


def test_the_second_term_vanishes_at_the_best_response() -> None:
    """Danskin's theorem, section 2.4: df/dtheta_D = 0 where D has maximised f itself."""
    shares = [second_share(unroll.Minimax(), steps) for steps in (1, 10, 50, 100)]
    assert shares[0] > 0.1
    assert shares[0] > 10 * shares[1] > 1e3 * shares[2]
    assert shares[3] < 1e-9
    assert second_share(unroll.NonSaturating(), 100) > 0.1  # another game for G: no such theorem


def test_unrolled_discriminator_carries_the_second_term() -> None:
    loss, game = reference(3)
    theta = game.theta.clone().requires_grad_()
    fake, real = game.fake(theta), game.real[0]
    ahead = loss.unroll(fake, real)
    value = unroll.Minimax().generator_loss(ahead, fake, real)
    assert_same(value_and_gradient(value, theta), value_and_gradient(loss(fake, real), theta))


def test_noise_for_fakes_of_every_step_reaches_the_gradient() -> None:
    loss, game = reference(3)
    fakes = [f.requires_grad_() for f in randn(4, 6, 2)]
    value = loss(fakes[0], game.real[0], minibatches=zip(fakes[1:], game.real[1:4], strict=True))
    assert all(g.norm() > 1e-4 for g in torch.autograd.grad(value, fakes))
