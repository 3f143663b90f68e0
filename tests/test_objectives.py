"""Every objective against its formula, penalties against closed forms, and their sums."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unroll
from tests.players import batches, fakes, small, tanh_net, train
from tests.settings import DEVICE, rand, randn
from unroll import (
    R1,
    R2,
    Criterion,
    GradientPenalty,
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    Objective,
    RelativisticAverage,
    RelativisticPairing,
    UnrolledGeneratorLoss,
    Wasserstein,
)

Formula = Callable[[Tensor, Tensor], Tensor]


def s(x: Tensor) -> Tensor:
    """Return the logistic function."""
    return 1 / (1 + torch.exp(-x))


# D's loss and G's loss from the logits of real and fake samples, as the papers write them.
FORMULAS: dict[str, tuple[Objective, Formula, Formula]] = {
    "Minimax": (
        Minimax(),
        lambda r, f: -(s(r).log().mean() + (1 - s(f)).log().mean()),
        lambda r, f: s(r).log().mean() + (1 - s(f)).log().mean(),
    ),
    "NonSaturating": (
        NonSaturating(),
        lambda r, f: -(s(r).log().mean() + (1 - s(f)).log().mean()),
        lambda _, f: -s(f).log().mean(),
    ),
    "LeastSquares": (
        LeastSquares(),
        lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2,
        lambda _, f: ((f - 1) ** 2).mean() / 2,
    ),
    "Hinge": (
        Hinge(),
        lambda r, f: (1 - r).clamp_min(0).mean() + (1 + f).clamp_min(0).mean(),
        lambda _, f: -f.mean(),
    ),
    "Wasserstein": (
        Wasserstein(),
        lambda r, f: f.mean() - r.mean(),
        lambda _, f: -f.mean(),
    ),
    "RelativisticPairing": (
        RelativisticPairing(),
        lambda r, f: -s(r - f).log().mean(),
        lambda r, f: -s(f - r).log().mean(),
    ),
    "RelativisticAverage": (
        RelativisticAverage(),
        lambda r, f: -s(r - f.mean()).log().mean() - (1 - s(f - r.mean())).log().mean(),
        lambda r, f: -s(f - r.mean()).log().mean() - (1 - s(r - f.mean())).log().mean(),
    ),
    "Criterion": (
        Criterion(nn.BCEWithLogitsLoss()),
        lambda r, f: -s(r).log().mean() - (1 - s(f)).log().mean(),
        lambda _, f: -s(f).log().mean(),
    ),
    "Criterion, weighted and smoothed": (
        Criterion(nn.MSELoss(), real_label=0.9, fake_label=-1.0, weight=0.5),
        lambda r, f: 0.5 * (((r - 0.9) ** 2).mean() + ((f + 1) ** 2).mean()),
        lambda _, f: ((f - 0.9) ** 2).mean(),
    ),
    "Criterion on probabilities": (
        Criterion(lambda output, target: nn.functional.binary_cross_entropy(s(output), target)),
        lambda r, f: -s(r).log().mean() - (1 - s(f)).log().mean(),
        lambda _, f: -s(f).log().mean(),
    ),
}  # fmt: skip


def identity(batch: Any) -> Any:
    """Return the batch: a D whose inputs are the logits."""
    return batch


@pytest.mark.parametrize("shape", [(7,), (7, 1), (3, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str, shape: tuple[int, ...]) -> None:
    objective, d_formula, g_formula = FORMULAS[name]
    fake, real = 2 * randn(*shape), 2 * randn(*shape) + 0.3
    d_loss = objective.discriminator_loss(identity, fake, real)
    g_loss = objective.generator_loss(identity, fake, real)
    assert d_loss.shape == g_loss.shape == ()
    torch.testing.assert_close(d_loss, d_formula(real, fake), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(g_loss, g_formula(real, fake), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", FORMULAS)
def test_unequal_batches(name: str) -> None:
    """Means over each batch, except where samples come in pairs."""
    objective, d_formula, g_formula = FORMULAS[name]
    fake, real = randn(6, 1), randn(4, 1)
    if name == "RelativisticPairing":
        for method in (objective.discriminator_loss, objective.generator_loss):
            with pytest.raises(ValueError, match=r"fake, real: .*\(4, 1\) for real and \(6, 1\)"):
                method(identity, fake, real)
        return
    torch.testing.assert_close(
        objective.discriminator_loss(identity, fake, real), d_formula(real, fake)
    )
    torch.testing.assert_close(
        objective.generator_loss(identity, fake, real), g_formula(real, fake)
    )


def test_pairing_is_sample_by_sample() -> None:
    """A loss of pairs changes when one side is permuted; that of the others does not."""
    fake, real = randn(6), randn(6)
    swapped = fake.flip(0)
    for name, (objective, *_) in FORMULAS.items():
        before = objective.discriminator_loss(identity, fake, real)
        after = objective.discriminator_loss(identity, swapped, real)
        same = torch.allclose(before, after, rtol=1e-12, atol=0)
        assert same is (name != "RelativisticPairing"), name


@pytest.mark.parametrize("name", ["Minimax", "NonSaturating", "RelativisticPairing", "Criterion"])
def test_large_logits_stay_finite(name: str) -> None:
    objective = FORMULAS[name][0]
    logits = torch.tensor([-1e4, 1e4], device=DEVICE, requires_grad=True)
    for method in (objective.discriminator_loss, objective.generator_loss):
        loss = method(identity, logits, logits.flip(0))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


class Recorder:
    """A D that writes down what it is called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, batch: Any) -> Tensor:
        self.calls.append(batch)
        output: Tensor = torch.sigmoid(batch)
        return output


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("smooth", [1.0, 0.9])
def test_criterion_is_the_loop_it_replaces(weight: float, smooth: float) -> None:
    """PyTorch's DCGAN tutorial: real first, then fake, then G against the real label."""
    bce = nn.BCELoss()
    objective = Criterion(bce, real_label=smooth, weight=weight)
    fake, real = randn(5, 1), randn(5, 1)
    d = Recorder()
    d_loss = objective.discriminator_loss(d, fake, real)
    assert [id(call) for call in d.calls] == [id(real), id(fake)]
    ones, zeros = torch.full_like(real, smooth), torch.zeros_like(real)
    wanted = weight * (bce(torch.sigmoid(real), ones) + bce(torch.sigmoid(fake), zeros))
    assert torch.equal(d_loss, wanted)
    d = Recorder()
    assert torch.equal(objective.generator_loss(d, fake, real), bce(torch.sigmoid(fake), ones))
    assert [id(call) for call in d.calls] == [id(fake)]


class Quadratic(nn.Module):
    """D(x) = a . x + c ||x||^2 / 2, whose gradient in x is a + c x."""

    def __init__(self, c: float, size: int = 3) -> None:
        super().__init__()
        self.a = nn.Parameter(randn(size))
        self.c = nn.Parameter(torch.tensor(c, device=DEVICE, dtype=torch.float64))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        x = x.flatten(1)
        return x @ self.a + self.c * x.square().sum(1) / 2

    def norms(self, x: Tensor) -> Tensor:
        """Return the squared norm of the gradient, per sample."""
        return (self.a + self.c * x.flatten(1)).square().sum(1)


@pytest.mark.parametrize("c", [0.0, 0.7])
def test_r1_and_r2_in_closed_form(c: float) -> None:
    d = Quadratic(c)
    fake, real = randn(5, 3), randn(4, 3)
    r1 = R1(3.0).discriminator_loss(d, fake, real)
    r2 = R2(3.0).discriminator_loss(d, fake, real)
    torch.testing.assert_close(r1, 1.5 * d.norms(real).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(r2, 1.5 * d.norms(fake).mean(), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(r1, d.a)
    torch.testing.assert_close(gradient, 3.0 * (d.a + c * real).mean(0), rtol=1e-12, atol=1e-14)


def test_r2_reaches_the_generator_through_its_samples() -> None:
    d = Quadratic(0.7)
    fake, real = randn(5, 3).requires_grad_(), randn(4, 3)
    (gradient,) = torch.autograd.grad(R2(3.0).discriminator_loss(d, fake, real), fake)
    wanted = 3.0 * 0.7 * (d.a + 0.7 * fake) / 5
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_penalties_cost_the_generator_nothing_directly() -> None:
    d = Quadratic(0.7)
    fake, real = randn(5, 3).requires_grad_(), randn(5, 3)
    for penalty in (R1(1.0), R2(1.0), GradientPenalty()):
        assert penalty.generator_loss(d, fake, real).item() == 0
    base = Minimax().generator_loss(d, fake, real)
    total = Minimax() + R1(1.0) + R2(1.0) + GradientPenalty()
    assert torch.equal(total.generator_loss(d, fake, real), base)


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)], ids=str)
def test_gradient_penalty_in_closed_form(shape: tuple[int, ...]) -> None:
    """Each sample has a share of its own, drawn from the global generator."""
    d = Quadratic(0.7, size=math.prod(shape))
    fake, real = randn(5, *shape), randn(5, *shape)
    torch.manual_seed(3)
    got = GradientPenalty(4.0).discriminator_loss(d, fake, real)
    torch.manual_seed(3)
    share = rand(5, *[1] * len(shape))
    norms = d.norms(share * real + (1 - share) * fake).sqrt()
    torch.testing.assert_close(got, 4 * ((norms - 1) ** 2).mean(), rtol=1e-12, atol=0)
    again = GradientPenalty(4.0).discriminator_loss(d, fake, real)
    assert not torch.equal(again, got)


def test_gradient_penalty_of_a_linear_d_does_not_depend_on_the_draw() -> None:
    d = nn.Linear(3, 1).to(DEVICE, torch.float64)
    got = GradientPenalty().discriminator_loss(d, randn(5, 3), randn(5, 3))
    torch.testing.assert_close(got, 10 * (d.weight.norm() - 1) ** 2, rtol=1e-12, atol=0)


def test_gradient_penalty_is_finite_at_a_zero_gradient() -> None:
    """A D whose last layer is zero: 0 is where the norm has no slope."""
    d = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DEVICE, torch.float64)
    last = d.get_submodule("2")
    nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    fake, real = randn(5, 3).requires_grad_(), randn(5, 3)
    penalty = GradientPenalty(2.0).discriminator_loss(d, fake, real)
    assert penalty.item() == 2.0
    gradients = torch.autograd.grad(penalty, list(d.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    loss = UnrolledGeneratorLoss(d, optimizer, Wasserstein() + GradientPenalty(2.0), unroll_steps=3)
    loss(fake, real).backward()
    assert fake.grad is not None
    assert fake.grad.isfinite().all()


@pytest.mark.parametrize("form", ["tuple", "mapping", "label first"])
@pytest.mark.parametrize("penalty", [R1(2.0), R2(2.0), GradientPenalty(2.0)], ids=repr)
def test_penalties_act_on_the_first_floating_tensor(form: str, penalty: Objective) -> None:
    labels = torch.arange(5, device=DEVICE)

    class Labelled(Quadratic):
        def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
            x, label = (label, x) if not x.is_floating_point() else (x, label)  # type: ignore[assignment]
            assert label is not None
            assert torch.equal(label, labels)
            return super().forward(x)

    d = Labelled(0.7)
    fake, real = randn(5, 3), randn(5, 3)

    def feed(x: Tensor) -> Any:
        if form == "mapping":
            return {"label": labels, "x": x}
        return (x, labels) if form == "tuple" else (labels, x)

    def call(batch: Any) -> Tensor:
        output: Tensor = d(**batch) if isinstance(batch, dict) else d(*batch)
        return output

    torch.manual_seed(3)
    got = penalty.discriminator_loss(call, feed(fake), feed(real))
    torch.manual_seed(3)
    plain = penalty.discriminator_loss(lambda x: Quadratic.forward(d, x), fake, real)
    torch.testing.assert_close(got, plain, rtol=1e-14, atol=0)
    assert got > 0


class Mine:
    """A user's own objective, which knows nothing of this library."""

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        """Return some loss."""
        loss: Tensor = discriminator(fake).square().mean() - discriminator(real).mean()
        return loss

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        """Return some loss."""
        loss: Tensor = -discriminator(fake).mean()
        return loss


@pytest.mark.parametrize("base", [Minimax(), Mine()], ids=["Minimax", "one's own"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_sums_in_every_order(base: Objective, order: tuple[int, ...]) -> None:
    d = Quadratic(0.7)
    fake, real = randn(5, 3), randn(5, 3)
    parts: list[Any] = [base, R1(1.0), R2(3.0)]
    first, second, third = (parts[i] for i in order)
    wanted = [
        sum(part.discriminator_loss(d, fake, real) for part in parts),
        sum(part.generator_loss(d, fake, real) for part in parts),
    ]
    for total in (first + second + third, first + (second + third)):
        got = [total.discriminator_loss(d, fake, real), total.generator_loss(d, fake, real)]
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_sums_of_two_own_objectives_with_a_penalty_between() -> None:
    d, fake, real = Quadratic(0.7), randn(5, 3), randn(5, 3)
    total: Any = Mine() + R1(1.0) + Mine()
    mine = Mine().discriminator_loss(d, fake, real)
    wanted = 2 * mine + R1(1.0).discriminator_loss(d, fake, real)
    torch.testing.assert_close(total.discriminator_loss(d, fake, real), wanted)


def test_objectives_are_values() -> None:
    """Equal, hashable, printable and immutable."""
    assert R1(1.0) == R1(1.0) != R1(2.0)
    assert Minimax() == Minimax()
    assert hash(Minimax() + R1(1.0)) == hash(Minimax() + R1(1.0))
    assert repr(Criterion(nn.MSELoss(), 0.9)).startswith("Criterion(loss_fn=MSELoss(), real_label=")
    for value in (R1(1.0), GradientPenalty(), Criterion(nn.MSELoss())):
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(value, next(iter(vars(value))), 3.0)


@pytest.mark.parametrize("name", FORMULAS)
def test_k_0_is_the_ordinary_loss(name: str) -> None:
    """Bit for bit, and so is its gradient."""
    objective = FORMULAS[name][0]
    d = small()
    ((fake, real),) = batches(1)
    got, wanted = fake.clone().requires_grad_(), fake.clone().requires_grad_()
    optimizer = torch.optim.Adam(d.parameters())
    value = UnrolledGeneratorLoss(d, optimizer, objective, unroll_steps=0)(got, real)
    value.backward()
    plain = objective.generator_loss(d, wanted, real)
    torch.autograd.backward(plain)
    assert torch.equal(value, plain)
    assert got.grad is not None
    assert wanted.grad is not None
    assert torch.equal(got.grad, wanted.grad)


def test_every_public_objective_is_tested_here() -> None:
    shipped = {
        name
        for name, item in vars(unroll).items()
        if isinstance(item, type) and hasattr(item, "generator_loss") and item is not Objective
    }
    tested = {type(objective).__name__ for objective, *_ in FORMULAS.values()}
    assert shipped == tested | {"R1", "R2", "GradientPenalty"}


@pytest.mark.parametrize("penalty", [unroll.R1(1.0), unroll.R2(1.0), unroll.GradientPenalty(1.0)])
def test_penalties_take_samples_that_are_numbers(penalty: Any) -> None:
    class Dirac(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.psi = nn.Parameter(torch.ones((), device=DEVICE, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.psi * x

    d = Dirac()
    loss = UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), lr=0.3), unroll.Minimax() + penalty, unroll_steps=1
    )
    assert loss(randn(5).requires_grad_(), randn(5)).isfinite()


class PenaltyOnFakes:
    """A penalty as loops write it, on the very tensor that all look-ahead steps share."""

    def discriminator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        x = fake if fake.requires_grad else fake.requires_grad_()
        out = discriminator(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss: Tensor = out.mean() - discriminator(real).mean() + slope.square().sum(1).mean()
        return loss

    def generator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(discriminator(fake).sum(), fake, create_graph=True)
        loss: Tensor = slope.square().mean() - discriminator(fake).mean()
        return loss


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_penalty_on_the_fakes_themselves_is_taken_at_a_fixed_theta(checkpoint: bool) -> None:
    d, fake, real = tanh_net(), fakes(), randn(5, 3)
    loss = UnrolledGeneratorLoss(
        d,
        torch.optim.SGD(d.parameters(), lr=0.3),
        PenaltyOnFakes(),
        unroll_steps=3,
        checkpoint=checkpoint,
    )
    ahead = loss.unroll(fake, real)
    copied = copy.deepcopy(d)
    train(
        copied,
        torch.optim.SGD(copied.parameters(), lr=0.3),
        [(fake.detach(), real)] * 3,
        PenaltyOnFakes(),
    )
    for name, parameter in copied.named_parameters():
        torch.testing.assert_close(ahead.parameters[name], parameter, rtol=1e-12, atol=1e-14)

    wanted = PenaltyOnFakes().generator_loss(copied, fake.detach().requires_grad_(), real)
    torch.testing.assert_close(loss(fake, real), wanted, rtol=1e-12, atol=1e-14)
    if not checkpoint:
        report = unroll.check_gradients(loss, fake, real)
        assert report.ok, report


def unpacked(function: Callable[..., Tensor]) -> Callable[[Any], Tensor]:
    return lambda batch: function(**batch) if isinstance(batch, dict) else function(*batch)


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) + b.square().sum(1)


def test_a_tensor_in_two_places_is_moved_in_the_first_one_alone() -> None:
    x, y = randn(6, 4), randn(6, 4)
    loss = R1(2.0).discriminator_loss(unpacked(_pairs), (x, y), (x, x))
    torch.testing.assert_close(loss, x.square().sum(1).mean())
    apart = R1(2.0).discriminator_loss(unpacked(_pairs), (x, y), (x, x.clone()))
    torch.testing.assert_close(loss, apart)


def test_a_gradient_penalty_takes_samples_by_their_names() -> None:
    def named(image: Tensor, cond: Tensor) -> Tensor:
        return _pairs(image, cond)

    image, cond, made = randn(3, 6, 4)
    fake, found = {"cond": cond, "image": made}, []
    for real in ({"cond": cond, "image": image}, {"image": image, "cond": cond}):
        torch.manual_seed(0)
        found.append(GradientPenalty().discriminator_loss(unpacked(named), fake, real))
    # Between conditions first, then between images, whose gradient is the condition.
    for got, gradient in zip(found, (image + 2 * cond, cond), strict=True):
        wanted = 10 * (gradient.square().sum(1).sqrt() - 1).square().mean()
        torch.testing.assert_close(got, wanted)


def test_a_number_beside_the_samples_is_not_what_a_penalty_moves() -> None:
    alpha, x = torch.tensor(2.0, dtype=torch.float64, device=DEVICE), randn(6, 4)

    def scaled(alpha: Tensor, x: Tensor) -> Tensor:
        return alpha * x.sum(1)

    loss = R1(2.0).discriminator_loss(unpacked(scaled), (alpha, x), (alpha, x))
    torch.testing.assert_close(loss, torch.tensor(16.0, dtype=torch.float64, device=DEVICE))
