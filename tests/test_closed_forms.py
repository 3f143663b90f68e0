"""Games whose f_K and gradients are known on paper, to 1e-12."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import unroll
from tests.games import OBJECTIVES
from tests.settings import DEVICE, randn

PSI, THETA, REAL, LR = 0.7, -1.3, 0.4, 0.3
STEPS = (0, 1, 2, 5, 20)


def dirac(x: float) -> Tensor:
    """Return a distribution that is one point."""
    return torch.tensor([[x]], dtype=torch.float64, device=DEVICE)


def dirac_discriminator() -> nn.Linear:
    """Return D(x) = psi x."""
    d = nn.Linear(1, 1, bias=False, device=DEVICE, dtype=torch.float64)
    nn.init.constant_(d.weight, PSI)
    return d


def dirac_game(
    objective: Any,
    steps: int,
    optimizer: Callable[[nn.Module], Any] | None = None,
    *,
    real: float = REAL,
    **options: Any,
) -> tuple[float, float, float]:
    """Return f_K and the two terms of Eq. 12 of a Dirac-GAN, as the library has them."""
    d = dirac_discriminator()
    inner = torch.optim.SGD(d.parameters(), LR) if optimizer is None else optimizer(d)
    loss = unroll.UnrolledGeneratorLoss(d, inner, objective, unroll_steps=steps, **options)
    fake = dirac(THETA).requires_grad_()
    value = loss(fake, dirac(real))
    (whole,) = torch.autograd.grad(value, fake)
    (first,), (second,) = unroll.gradient_terms(loss, fake, dirac(real), [fake])
    assert whole.item() == pytest.approx((first + second).item(), rel=1e-13)
    return value.item(), first.item(), second.item()


def close(ours: tuple[float, ...], paper: tuple[float, ...]) -> None:
    """Compare to 1e-12 of the largest of a game's numbers."""
    scale = max(map(abs, paper))
    assert ours == pytest.approx(paper, rel=0, abs=1e-12 * scale)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_wasserstein_dirac_gan(steps: int, average: bool) -> None:
    """Psi_k = psi - eta k (theta - r), so that f_K = -psi theta + eta K (theta - r) theta.

    The mean over k = 1..K has (K + 1) / 2 in place of K.
    """
    k = (steps + 1) / 2 if average and steps else steps
    psi_k = PSI - LR * k * (THETA - REAL)
    close(
        dirac_game(unroll.Wasserstein(), steps, average=average),
        (-psi_k * THETA, -psi_k, LR * k * THETA),
    )


@pytest.mark.parametrize("steps", STEPS)
def test_wasserstein_dirac_gan_with_momentum(steps: int) -> None:
    """The gradient g = theta - r is constant, so b_k = (1 + mu + .. + mu^(k-1)) g."""
    momentum = 0.8
    total = sum((1 - momentum**k) / (1 - momentum) for k in range(1, steps + 1))
    psi_k = PSI - LR * total * (THETA - REAL)
    paper = (-psi_k * THETA, -psi_k, LR * total * THETA)
    for optimizer in (torch.optim.SGD, torchopt.SGD):
        ours = dirac_game(
            unroll.Wasserstein(),
            steps,
            lambda d, cls=optimizer: cls(d.parameters(), LR, momentum=momentum),  # type: ignore[misc]
        )
        close(ours, paper)


@pytest.mark.parametrize(
    "build",
    [
        lambda d: torch.optim.SGD(d.parameters(), LR, momentum=0.8, dampening=0.3),
        lambda d: torchopt.SGD(d.parameters(), LR, momentum=0.8, dampening=0.3),
        lambda d: torchopt.MetaSGD(d, LR, momentum=0.8, dampening=0.3),
    ],
)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_wasserstein_dirac_gan_with_live_momentum(
    build: Callable[[nn.Module], Any], steps: int, taken: int
) -> None:
    """The optimizer's buffer b after real steps is a constant; its first step is not damped::

        b_1 = g    b_{k+1} = mu b_k + (1 - d) g    psi_{k+1} = psi_k - eta b_{k+1}

    The derivatives in theta of b and psi follow the same rules from 0, with g' = 1.
    """
    d = dirac_discriminator()
    optimizer = build(d)
    g, psi, slope, b, b_slope = THETA - REAL, PSI, 0.0, 0.0, 0.0
    for k in range(taken + steps):
        b = 0.8 * b + 0.7 * g if k else g
        if k < taken:
            loss = unroll.Wasserstein().discriminator_loss(d, dirac(THETA), dirac(REAL))
            if isinstance(optimizer, torchopt.MetaOptimizer):
                optimizer.step(loss)
                torchopt.stop_gradient(optimizer)
                torchopt.stop_gradient(d)
            else:
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
        else:
            b_slope = 0.8 * b_slope + 0.7 if k else 1.0
            slope -= LR * b_slope
        psi -= LR * b
    unrolled = unroll.UnrolledGeneratorLoss(d, optimizer, unroll.Wasserstein(), unroll_steps=steps)
    fake = dirac(THETA).requires_grad_()
    value = unrolled(fake, dirac(REAL))
    (gradient,) = torch.autograd.grad(value, fake)
    close((value.item(), gradient.item()), (-psi * THETA, -psi - slope * THETA))


def test_a_bare_transformation_starts_afresh_at_every_call() -> None:
    """Damped momentum does not damp its first step, psi_1 = psi - eta g, whatever came before."""
    d = dirac_discriminator()
    bare = torchopt.sgd(LR, momentum=0.8, dampening=0.3)
    theta = tuple(d.parameters())
    bare.update(theta, bare.init(theta), inplace=False)
    loss = unroll.UnrolledGeneratorLoss(d, bare, unroll.Wasserstein(), unroll_steps=1)
    psi = PSI - LR * (THETA - REAL)
    for _ in range(2):
        fake = dirac(THETA).requires_grad_()
        value = loss(fake, dirac(REAL))
        (gradient,) = torch.autograd.grad(value, fake)
        close((value.item(), gradient.item()), (-psi * THETA, -psi + LR * THETA))


@pytest.mark.parametrize(
    ("penalty", "stiffness", "rest"),
    [
        (unroll.R1(0.6), 0.6, 0.0),
        (unroll.R2(0.6), 0.6, 0.0),
        (unroll.R1(0.2) + unroll.R2(0.3), 0.5, 0.0),
        (unroll.GradientPenalty(0.3), 0.6, 1.0),
    ],
)
@pytest.mark.parametrize("steps", STEPS)
def test_penalised_wasserstein_dirac_gan(
    penalty: Any, stiffness: float, rest: float, steps: int
) -> None:
    """dD/dx = psi: the penalty is c / 2 (psi - a)^2 with a = 0, or 1 for the gradient penalty.

    So psi_K = p + (1 - eta c)^K (psi - p), where p = a - (theta - r) / c and p' = -1 / c.
    """
    p, power = rest - (THETA - REAL) / stiffness, (1 - LR * stiffness) ** steps
    psi_k, slope = p + power * (PSI - p), -(1 - power) / stiffness
    close(
        dirac_game(unroll.Wasserstein() + penalty, steps),
        (-psi_k * THETA, -psi_k, -slope * THETA),
    )


@pytest.mark.parametrize("real", [REAL, THETA])
@pytest.mark.parametrize("eps", [0.5, 0.01])
@pytest.mark.parametrize("steps", STEPS)
def test_wasserstein_dirac_gan_with_adam(steps: int, eps: float, real: float) -> None:
    """With a constant gradient both corrected moments are: psi_K = psi - eta K g / (|g| + eps).

    The derivative of g / (|g| + eps) is eps / (|g| + eps)^2, at g = 0 too.
    """
    g = THETA - real
    psi_k = PSI - LR * steps * g / (abs(g) + eps)
    paper = (-psi_k * THETA, -psi_k, LR * steps * THETA * eps / (abs(g) + eps) ** 2)
    for amsgrad in (False, True):
        ours = dirac_game(
            unroll.Wasserstein(),
            steps,
            lambda d, a=amsgrad: torch.optim.Adam(d.parameters(), LR, eps=eps, amsgrad=a),  # type: ignore[misc]
            real=real,
        )
        close(ours, paper)


def sigmoid(x: float) -> float:
    """Return 1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("objective", ["minimax", "non_saturating"])
@pytest.mark.parametrize("real", [0.0, REAL])
@pytest.mark.parametrize("steps", STEPS)
def test_minimax_dirac_gan(objective: str, real: float, steps: int) -> None:
    """D descends log(1 + e^(-psi r)) + log(1 + e^(psi theta)); with s = sigmoid::

        psi_1  = psi - eta (s(psi theta) theta - s(-psi r) r)
        psi_1' = -eta (s + theta psi s (1 - s))             where s = s(psi theta)
        psi_2' = psi_1' - eta (s + theta s (1 - s) (psi_1 + theta psi_1') + q (1 - q) r^2 psi_1')
                                                            where s = s(psi_1 theta), q = s(psi_1 r)

    and so on. G has -log(1 + e^(-psi_K r)) - log(1 + e^(psi_K theta)), whose derivatives are
    -s psi_K in theta, and -s theta + s(-psi_K r) r in psi_K; or log(1 + e^(-psi_K theta)).
    """
    psi, slope = PSI, 0.0
    for _ in range(steps):
        s, q = sigmoid(psi * THETA), sigmoid(psi * real)
        change = s + THETA * s * (1 - s) * (psi + THETA * slope) + q * (1 - q) * real**2 * slope
        psi, slope = psi - LR * (s * THETA - (1 - q) * real), slope - LR * change
    s, q = sigmoid(psi * THETA), sigmoid(psi * real)
    if objective == "minimax":
        paper = (
            math.log(q) + math.log(1 - s),
            -s * psi,
            (-s * THETA + (1 - q) * real) * slope,
        )
    else:
        paper = (-math.log(s), -(1 - s) * psi, -(1 - s) * THETA * slope)
    close(dirac_game(OBJECTIVES[objective], steps, real=real), paper)


@pytest.mark.parametrize("steps", STEPS)
def test_least_squares_dirac_gan(steps: int) -> None:
    """D descends ((psi r - 1)^2 + (psi theta)^2) / 2, a parabola with curvature h = r^2 + theta^2.

    So psi_K = a + (1 - eta h)^K (psi - a) with a = r / h, and with h' = 2 theta, a' = -a h' / h::

        psi_K' = a' (1 - (1 - eta h)^K) - K eta h' (1 - eta h)^(K - 1) (psi - a)
    """
    h, h1 = REAL**2 + THETA**2, 2 * THETA
    a = REAL / h
    a1, rate = -a * h1 / h, 1 - LR * h
    psi_k = a + rate**steps * (PSI - a)
    slope = a1 * (1 - rate**steps)
    slope -= steps * LR * h1 * rate ** max(steps - 1, 0) * (PSI - a)
    residual = psi_k * THETA - 1
    paper = (residual**2 / 2, residual * psi_k, residual * THETA * slope)
    close(dirac_game(unroll.LeastSquares(), steps), paper)


@pytest.mark.parametrize("average", [False, True])
def test_resampled_wasserstein_dirac_gan(average: bool) -> None:
    """Psi_K = psi - eta sum_k (theta_k - r_k): every fake has a gradient of its own."""
    thetas, reals = [0.5, -0.2, 1.1], [0.3, 0.9, -0.4]
    d = dirac_discriminator()
    loss = unroll.UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), LR), unroll.Wasserstein(), unroll_steps=3,
        average=average,
    )  # fmt: skip
    fake = dirac(THETA).requires_grad_()
    pairs = [(dirac(t).requires_grad_(), dirac(r)) for t, r in zip(thetas, reals, strict=True)]
    value = loss(fake, dirac(REAL), minibatches=pairs)
    gradients = torch.autograd.grad(value, [fake, *(pair[0] for pair in pairs)])
    # Step k counts in f_k..f_K: all of f_K, or this share of the mean.
    shares = [1.0, 2 / 3, 1 / 3] if average else [1.0, 1.0, 1.0]
    moves = [s * (t - r) for s, t, r in zip(shares, thetas, reals, strict=True)]
    psi = PSI - LR * sum(moves)
    close(
        (value.item(), *(g.item() for g in gradients)),
        (-psi * THETA, -psi, *(LR * THETA * s for s in shares)),
    )


@dataclass(frozen=True)
class LinearQuadratic:
    """D(x) = psi x descends E D(fake) - E D(real) + E D(real)^2 / 2; G descends -E D(fake)."""

    def discriminator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        on_real = discriminator(real)
        loss: Tensor = discriminator(fake).mean() - on_real.mean() + on_real.square().mean() / 2
        return loss

    def generator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        loss: Tensor = -discriminator(fake).mean()
        return loss


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_linear_quadratic_game(steps: int, average: bool) -> None:
    """D descends psi (m - r) + psi C psi / 2; C = E[x x^T], m and r are the means of fake and real.

    So psi_K = M psi + (I - M) psi*, where M = (I - eta C)^K and psi* = C^-1 (r - m), and

        f_K = -psi_K m     first term: -psi_K in m     second term: (I - M) C^-1 m

    (symmetric matrices, which commute). With G(z) = W z + b, what is v in m is v in b and v E[z]^T
    in W. The mean over k = 1..K has the mean of the M_k in place of M.
    """
    d = nn.Linear(3, 1, bias=False).to(DEVICE, torch.float64)
    generator = nn.Linear(2, 3).to(DEVICE, torch.float64)
    z, real = randn(7, 2), randn(5, 3) + 1
    loss = unroll.UnrolledGeneratorLoss(
        d,
        torch.optim.SGD(d.parameters(), LR),
        LinearQuadratic(),
        unroll_steps=steps,
        average=average,
    )
    fake = generator(z)
    value = loss(fake, real)
    first, second = unroll.gradient_terms(loss, fake, real, generator.parameters())
    whole = torch.autograd.grad(value, list(generator.parameters()))

    with torch.no_grad():
        c = real.T @ real / len(real)
        identity = torch.eye(3, dtype=c.dtype, device=c.device)
        ks = range(1, steps + 1) if average and steps else [steps]
        powers = [torch.linalg.matrix_power(identity - LR * c, k) for k in ks]
        power = torch.stack(powers).mean(0)
        m, psi, psi_best = (
            fake.mean(0),
            d.weight[0],
            torch.linalg.solve(c, real.mean(0) - fake.mean(0)),
        )
        psi_k = power @ psi + (identity - power) @ psi_best
        in_mean = [-psi_k, (identity - power) @ torch.linalg.solve(c, m)]
        expected = [(torch.outer(v, z.mean(0)), v) for v in in_mean]
    scale = torch.cat(in_mean).abs().max().item()
    assert value.item() == pytest.approx(-(psi_k @ m).item(), rel=1e-12)
    for ours, paper in zip((first, second), expected, strict=True):
        for a, b in zip(ours, paper, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)
    for a, b, c in zip(whole, *expected, strict=True):
        torch.testing.assert_close(a, b + c, rtol=0, atol=1e-12 * scale)


def log_sigmoid(x: Tensor) -> Tensor:
    """Return log s(x), as the papers write it."""
    return (1 / (1 + (-x).exp())).log()


def cross_entropy(x: Tensor, label: float) -> Tensor:
    """Return the mean of -label log s(x) - (1 - label) log(1 - s(x))."""
    return -(label * log_sigmoid(x) + (1 - label) * log_sigmoid(-x)).mean()


# name -> (D's loss, G's loss) of the logits a of real and b of fake
TEXTBOOK: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "minimax": (
        lambda a, b: -(log_sigmoid(a).mean() + log_sigmoid(-b).mean()),
        lambda a, b: log_sigmoid(a).mean() + log_sigmoid(-b).mean(),
    ),
    "non_saturating": (
        lambda a, b: -(log_sigmoid(a).mean() + log_sigmoid(-b).mean()),
        lambda _, b: -log_sigmoid(b).mean(),
    ),
    "least_squares": (
        lambda a, b: ((a - 1) ** 2).mean() / 2 + (b**2).mean() / 2,
        lambda _, b: ((b - 1) ** 2).mean() / 2,
    ),
    "hinge": (
        lambda a, b: (1 - a).clamp(min=0).mean() + (1 + b).clamp(min=0).mean(),
        lambda _, b: -b.mean(),
    ),
    "wasserstein": (lambda a, b: b.mean() - a.mean(), lambda _, b: -b.mean()),
    "pairing": (
        lambda a, b: -log_sigmoid(a - b).mean(),
        lambda a, b: -log_sigmoid(b - a).mean(),
    ),
    "average": (
        lambda a, b: -log_sigmoid(a - b.mean()).mean() - log_sigmoid(a.mean() - b).mean(),
        lambda a, b: -log_sigmoid(b - a.mean()).mean() - log_sigmoid(b.mean() - a).mean(),
    ),
    "bce": (
        lambda a, b: (cross_entropy(a, 0.9) + cross_entropy(b, 0.1)) / 2,
        lambda _, b: cross_entropy(b, 0.9),
    ),
    "mse": (
        lambda a, b: ((a - 1) ** 2).mean() + (b**2).mean(),
        lambda _, b: ((b - 1) ** 2).mean(),
    ),
}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_objectives_are_the_textbook_ones(name: str) -> None:
    real, fake = 2 * randn(6, 1) + 0.5, 2 * randn(6, 1)
    for ours, paper in zip(
        (OBJECTIVES[name].discriminator_loss, OBJECTIVES[name].generator_loss),
        TEXTBOOK[name],
        strict=True,
    ):
        torch.testing.assert_close(
            ours(lambda x: x, fake, real), paper(real, fake), rtol=1e-13, atol=1e-13
        )


def test_penalties_are_the_textbook_ones() -> None:
    """D(x) = x A x / 2 + b x has the gradient A x + b, if A is symmetric."""
    a, b = randn(3, 3), randn(3)
    a = a + a.T
    real, fake = randn(6, 3), randn(6, 3)

    def d(x: Tensor) -> Tensor:
        return ((x @ a) * x).sum(1) / 2 + x @ b

    def squared(x: Tensor) -> Tensor:
        return (x @ a + b).square().sum(1)

    torch.manual_seed(5)
    share = torch.rand(6, 1, dtype=real.dtype, device=real.device)
    between = share * real + (1 - share) * fake
    torch.manual_seed(5)
    penalties: dict[Any, Tensor] = {
        unroll.R1(0.7): 0.35 * squared(real).mean(),
        unroll.R2(0.7): 0.35 * squared(fake).mean(),
        unroll.GradientPenalty(3.0): 3 * (squared(between).sqrt() - 1).square().mean(),
    }
    for penalty, expected in penalties.items():
        ours = penalty.discriminator_loss(d, fake, real)
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
        assert penalty.generator_loss(d, fake, real).item() == 0
    together = unroll.Wasserstein() + unroll.R1(0.7) + unroll.R2(0.7)
    expected = d(fake).mean() - d(real).mean() + 0.35 * (squared(real) + squared(fake)).mean()
    torch.testing.assert_close(together.discriminator_loss(d, fake, real), expected)
    torch.testing.assert_close(together.generator_loss(d, fake, real), -d(fake).mean())
