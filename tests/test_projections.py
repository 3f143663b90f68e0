"""``project=`` against real steps that project D's parameters, and against central differences."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unroll
from tests.oracles import plain_difference, relative_error
from tests.players import batches, fakes, tanh_net, train, with_options
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from unroll import (
    Objective,
    RelativisticPairing,
    UnrolledGeneratorLoss,
    Wasserstein,
    check_gradients,
)

Build = Callable[[nn.Module], torch.optim.Optimizer]
Projection = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
LIMIT = 0.15  # of the clipping: D's weights start on both sides of it


def discriminator(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a D in which the clipping holds a part of the weights."""
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 1, bias=False)
    return nn.Sequential(*layers).to(DEVICE, dtype)


def clip(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """WGAN's weight clipping (Arjovsky et al. 2017, Algorithm 1)."""
    return {name: p.clamp(-LIMIT, LIMIT) for name, p in parameters.items()}


def clip_really(d: nn.Module) -> None:
    """Clip the parameters of a D, as WGAN's training loop does."""
    for parameter in d.parameters():
        parameter.data.clamp_(-LIMIT, LIMIT)


def normalise(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """RS-GAN's normalisation of the last layer's rows (Sun et al. 2020)."""
    last = parameters["4.weight"]
    return {**parameters, "4.weight": last / last.square().sum(1, keepdim=True).sqrt()}


def normalise_really(d: nn.Module) -> None:
    """Normalise the rows of the last layer of a D."""
    with torch.no_grad():
        last = d.get_parameter("4.weight")
        last.div_(last.norm(dim=1, keepdim=True))


def _groups(d: nn.Module) -> list[dict[str, Any]]:
    first, second, last = (list(d.get_submodule(name).parameters()) for name in "024")
    return [
        {"params": first, "lr": 0.05, "weight_decay": 0.1},
        {"params": second, "betas": (0.0, 0.9), "eps": 1e-3},
        {"params": last, "lr": 0.01, "eps": 1e-2},
    ]


GAMES: dict[str, tuple[Objective, Projection, Callable[[nn.Module], None]]] = {
    "WGAN": (Wasserstein(), clip, clip_really),
    "RS-GAN": (RelativisticPairing(), normalise, normalise_really),
}
OPTIMIZERS: dict[str, Build] = {
    "RMSprop": lambda d: torch.optim.RMSprop(d.parameters(), lr=0.02, eps=1e-3),
    "Adam": lambda d: torch.optim.Adam(d.parameters(), lr=0.02, betas=(0.5, 0.9), eps=1e-4),
    "SGD": lambda d: torch.optim.SGD(d.parameters(), lr=0.2, momentum=0.9),
    "groups": lambda d: torch.optim.Adam(_groups(d), lr=0.02),
}


def played(
    game: str, optimizer: str, *, warm: int = 3, frozen: bool = False, **options: Any
) -> tuple[UnrolledGeneratorLoss, nn.Module, Any]:
    """Return the loss of a game after real steps, its D and D's optimizer."""
    objective, project, really = GAMES[game]
    d = discriminator()
    if frozen:
        d.get_submodule("0").requires_grad_(False)
    trained = OPTIMIZERS[optimizer](d)
    for pair in batches(warm, seed=1):
        train(d, trained, [pair], objective)
        really(d)
    return UnrolledGeneratorLoss(d, trained, objective, project=project, **options), d, trained


def pairs_of(resampled: bool, k: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batch of f and those of the look-ahead's steps."""
    drawn = batches(k + 1, seed=2)
    return drawn if resampled else [drawn[0]] * (k + 1)


def assert_equal(got: Mapping[str, Tensor], d: nn.Module, tolerance: float) -> None:
    """Compare every parameter, relative to its norm."""
    assert list(got) == [name for name, _ in d.named_parameters()]
    for name, parameter in d.named_parameters():
        error = (got[name] - parameter).norm() / parameter.norm()
        assert error <= tolerance, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("resampled", [False, True], ids=["fixed", "resampled"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("game", GAMES)
def test_real_steps(game: str, optimizer: str, k: int, resampled: bool) -> None:
    """Training steps, each followed by the projection, lead to the same D."""
    loss, d, trained = played(game, optimizer, unroll_steps=k)
    pairs = pairs_of(resampled, k)
    ahead = loss.unroll(*pairs[0], minibatches=pairs[1:] if resampled else None)
    objective, _, really = GAMES[game]
    start = {name: p.detach().clone() for name, p in d.named_parameters()}
    for pair in pairs[1:]:
        train(d, trained, [pair], objective)
        really(d)
    assert_equal(ahead.parameters, d, 1e-12)
    if game == "WGAN":
        entries = torch.cat([p.detach().flatten() for p in d.parameters()]).abs()
        assert 0 < (entries == LIMIT).double().mean() < 1, "the clipping holds some of them"
    assert any(not torch.equal(start[name], p) for name, p in d.named_parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("game", GAMES)
def test_real_steps_of_a_frozen_backbone(game: str, optimizer: str) -> None:
    """Clipping reaches frozen weights too, as the training loop's does; gradients do not."""
    loss, d, trained = played(game, optimizer, frozen=True, warm=0, unroll_steps=3)
    (pair,) = batches(1, seed=2)
    ahead = loss.unroll(*pair)
    objective, _, really = GAMES[game]
    before = d.get_parameter("0.weight").detach().clone()
    for _ in range(3):
        train(d, trained, [pair], objective)
        really(d)
    assert_equal(ahead.parameters, d, 1e-12)
    assert torch.equal(d.get_parameter("0.weight"), before) == (game != "WGAN")


@pytest.mark.parametrize("average", [False, True], ids=["f_K", "average"])
@pytest.mark.parametrize("resampled", [False, True], ids=["fixed", "resampled"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen backbone"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("game", GAMES)
def test_central_differences(
    game: str, optimizer: str, frozen: bool, resampled: bool, average: bool
) -> None:
    """In the fakes of f and of every step."""
    k = 3
    loss, d, trained = played(game, optimizer, frozen=frozen, unroll_steps=k, average=average)
    pairs = pairs_of(resampled, k)[: k + 1 if resampled else 1]
    reals = [real for _, real in pairs]
    before = snapshot(d, trained)

    def f(fakes: Tensor) -> Tensor:
        rest = list(zip(fakes, reals, strict=True))[1:]
        value: Tensor = loss(fakes[0], reals[0], minibatches=rest if resampled else None)
        return value

    fakes = torch.stack([fake for fake, _ in pairs]).requires_grad_()
    (gradient,) = torch.autograd.grad(f(fakes), fakes)
    error = relative_error(f, fakes.detach(), gradient, slope=plain_difference)
    assert error <= 5e-7, f"off by {error:.1e}"
    assert all(g.abs().max() > 0 for g in gradient)
    assert not changes(before, d, trained)


def test_clipped_entries_stop_reacting() -> None:
    """Where every weight is at the limit after each step, D's reaction is exactly zero."""
    d = nn.Linear(4, 1, bias=False).to(DEVICE, torch.float64)
    trained = torch.optim.SGD(d.parameters(), lr=100.0)
    loss = UnrolledGeneratorLoss(d, trained, Wasserstein(), unroll_steps=2, project=clip)
    ((fake, real),) = batches(1)
    fake.requires_grad_()
    weight = loss.unroll(fake, real).parameters["weight"]
    assert bool((weight.abs() == LIMIT).all())
    (reaction,) = torch.autograd.grad(weight.sum(), fake)
    assert not reaction.any()
    (gradient,) = torch.autograd.grad(loss(fake, real), fake)
    torch.testing.assert_close(gradient, -weight.detach().expand(5, 4) / 5, rtol=1e-14, atol=0)


@pytest.mark.parametrize("optimizer", ["RMSprop", "Adam"])
@pytest.mark.parametrize("game", GAMES)
def test_float32(game: str, optimizer: str) -> None:
    objective, project, really = GAMES[game]
    d = discriminator(torch.float32)
    trained = OPTIMIZERS[optimizer](d)
    loss = UnrolledGeneratorLoss(d, trained, objective, unroll_steps=4, project=project)
    (pair,) = batches(1, torch.float32)
    ahead = loss.unroll(*pair)
    for _ in range(4):
        train(d, trained, [pair], objective)
        really(d)
    assert_equal(ahead.parameters, d, 1e-6)


@pytest.mark.parametrize("game", GAMES)
def test_check_gradients_passes(game: str) -> None:
    loss, _, _ = played(game, "Adam", unroll_steps=3)
    report = check_gradients(loss, *batches(1, seed=2)[0])
    assert report.ok, report


def test_stop_gradient_projects_too() -> None:
    """The same theta_D^K, held."""
    full, _, _ = played("WGAN", "Adam", unroll_steps=3)
    ((fake, real),) = batches(1, seed=2)
    wanted = full.unroll(fake, real).parameters
    got = with_options(full, stop_gradient=True).unroll(fake.requires_grad_(), real).parameters
    assert not any(p.requires_grad for p in got.values())
    for name, parameter in wanted.items():
        torch.testing.assert_close(got[name], parameter, rtol=1e-13, atol=1e-15)


def test_the_parameters_of_d_in_a_projection_are_refused() -> None:
    d = tanh_net()
    anchor: dict[str, Tensor] = dict(d.named_parameters())

    def near(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: p + 0.1 * (anchor[name] - p) for name, p in theta.items()}

    with pytest.raises(
        RuntimeError, match=r"the update uses D's parameter .* itself .*\.detach\(\)"
    ):
        UnrolledGeneratorLoss(
            d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2, project=near
        )(fakes(), randn(5, 3))
    anchor = {name: p.detach() for name, p in anchor.items()}
    UnrolledGeneratorLoss(
        d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2, project=near
    )(fakes(), randn(5, 3)).backward()
    assert all(p.grad is None for p in d.parameters())


def in_no_grad(theta: Any, most: float = 0.01) -> Any:
    with torch.no_grad():
        for p in theta.values():
            p.clamp_(-most, most)
    return theta


@pytest.mark.parametrize(
    "project",
    [
        in_no_grad,
        lambda theta: {k: p.detach().clamp(-0.01, 0.01) for k, p in theta.items()},
        lambda theta: [p.data.clamp_(-0.01, 0.01) for p in theta.values()] and theta,
    ],
)
def test_a_projection_outside_autograd_is_refused(project: Any) -> None:
    d = tanh_net()
    with pytest.raises(
        ValueError, match=r"project: must be differentiable; it changed '0\.weight'"
    ):
        UnrolledGeneratorLoss(
            d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2, project=project
        )(fakes(), randn(5, 3))


def test_a_projection_of_a_partly_frozen_discriminator_is_no_mistake() -> None:
    d = tanh_net()
    d[0].requires_grad_(False)
    optimizer = torch.optim.SGD(d[2].parameters(), lr=0.3)

    def clip(theta: Any) -> Any:
        return {name: p.clamp(-0.1, 0.1) for name, p in theta.items()}

    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, project=clip)
    assert unroll.check_gradients(loss, fakes(), fakes()).ok
    assert loss(fakes(), randn(5, 3)).isfinite()


@pytest.mark.parametrize("how", ["under no_grad", "through .data"])
def test_a_projection_that_leaves_autograd_at_a_later_step_is_refused(how: str) -> None:
    most = [100.0]

    def project(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        if how == "under no_grad":
            return in_no_grad(theta, most[0])  # type: ignore[no-any-return]
        for p in theta.values():
            p.data.clamp_(-most[0], most[0])
        return theta

    d = tanh_net()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.3)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, project=project)
    loss(fakes(), randn(5, 3))  # where nothing changes, nothing is lost
    most[0] = 0.01
    with pytest.raises(
        ValueError, match=r"project: must be differentiable; it changed '0\.weight'"
    ):
        loss(fakes(), randn(5, 3))
    with torch.no_grad():
        loss(fakes(), randn(5, 3))
