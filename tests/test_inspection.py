"""What the first call finds in D and in the objective: refused by name, or no mistake."""

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unroll
from tests.players import fakes, small, tanh_net, train
from tests.settings import DEVICE, randn
from tests.zoo_networks import Labelled
from tests.zoo_refused import Fused
from unroll import UnrolledGeneratorLoss


class FromAList(nn.Module):
    """It reads its weight from a plain list, where nobody can put another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(x @ self.weights[0].T))
        return output


def test_a_parameter_in_a_plain_list_is_refused() -> None:
    d = FromAList().to(DEVICE).double()
    with pytest.raises(RuntimeError, match=r"uses D's parameter 'layer\.weight' other than"):
        UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2)(
            fakes(), randn(5, 3)
        )
    assert d.layer.weight.grad is None


@pytest.mark.parametrize("k", [0, 2])
def test_the_search_draws_nothing_of_pythons_generator(k: int) -> None:
    """D flips its input now and then, as augmentations do."""

    class Flipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(random.random() * x)
            return output

    d = Flipping().to(DEVICE).double()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=k)
    fake, real, values = fakes(), randn(5, 3), []
    for _ in range(2):
        random.seed(0)
        values.append(loss(fake, real))
    assert values[0] == values[1]


def test_a_detached_look_ahead_is_searched_for_itself() -> None:
    d: nn.Module = FromAList().to(DEVICE).double()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2)
    with pytest.raises(RuntimeError, match=r"uses D's parameter 'layer\.weight' other than"):
        loss.unroll(randn(5, 3), randn(5, 3))
    d = nn.Sequential(nn.Linear(3, 1), Fused()).to(DEVICE).double()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2)
    loss.unroll(randn(5, 3), randn(5, 3))  # needs first derivatives only
    with pytest.raises(RuntimeError, match=r"needs a derivative that PyTorch does not have"):
        loss(fakes(), randn(5, 3))


@pytest.mark.parametrize("method", ["discriminator_loss", "generator_loss"])
def test_a_loss_of_parameters_that_it_keeps_is_refused(method: str) -> None:
    d = tanh_net()
    game, kept = unroll.Minimax(), list(d.parameters())

    def decayed(*batch: Any) -> Tensor:
        loss: Tensor = getattr(game, method)(*batch)
        return loss + sum(p.square().sum() for p in kept)

    class Decayed:
        discriminator_loss = staticmethod(game.discriminator_loss)
        generator_loss = staticmethod(game.generator_loss)

    objective = Decayed()
    setattr(objective, method, decayed)
    with pytest.raises(RuntimeError, match=r"uses D's parameter '.*' other than through"):
        UnrolledGeneratorLoss(
            d, torch.optim.SGD(d.parameters(), lr=0.3), objective, unroll_steps=1
        )(fakes(), randn(5, 3))


def test_complex_parameters_are_refused() -> None:
    d = nn.Linear(3, 1, dtype=torch.complex128)
    with pytest.raises(TypeError, match=r"parameter 'weight' is complex.*real and imaginary"):
        UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=1)


@torch.library.custom_op("unroll_tests::scaled", mutates_args=("into",))
def scaled(x: Tensor, slope: Tensor, into: Tensor) -> None:
    into.copy_(x * slope)


class Cube(torch.autograd.Function):
    """Its gradient comes from a kernel that autograd does not know, as fused attention's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: str) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.how == "of autograd":
            return 3 * x * x * gradient, None
        if ctx.how == "in NumPy":
            slope = 3 * x.detach().cpu().numpy() ** 2
            return torch.from_numpy(slope * gradient.detach().cpu().numpy()).to(x.device), None
        into = torch.empty_like(x)
        scaled(gradient, 3 * x * x, into)
        return into, None


class Cubed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        cube: Tensor = Cube.apply(x, self.how)
        return cube


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("how", ["in NumPy", "filling a tensor"])
def test_a_gradient_that_comes_from_outside_autograd_is_refused(how: str, penalised: bool) -> None:
    d = nn.Sequential(nn.Linear(3, 4), Cubed(how), nn.Linear(4, 1)).to(DEVICE).double()
    game = unroll.Minimax() + unroll.R1(1.0) if penalised else unroll.Minimax()
    with pytest.raises(RuntimeError, match=r"derivative .*, in 1 \(Cubed\) .*stop_gradient=True"):
        UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), game, unroll_steps=2)(
            fakes(), randn(5, 3)
        )


def test_without_the_second_term_it_is_not_needed() -> None:
    layers = nn.Linear(3, 4), Cubed("of autograd"), nn.Linear(4, 1)
    known = nn.Sequential(*layers).to(DEVICE).double()
    d = copy.deepcopy(known)
    vars(d[1]).update(how="in NumPy")
    fake, real = fakes(), randn(5, 3)
    losses = [
        UnrolledGeneratorLoss(
            one, torch.optim.SGD(one.parameters(), lr=0.3), unroll_steps=2, stop_gradient=True
        )
        for one in (d, known)
    ]
    torch.testing.assert_close(*[torch.autograd.grad(loss(fake, real), fake) for loss in losses])
    assert unroll.check_gradients(
        UnrolledGeneratorLoss(known, torch.optim.SGD(known.parameters(), lr=0.3), unroll_steps=2),
        fake,
        real,
    ).ok


class Auxiliary(torch.autograd.Function):
    """A loss that joins in the backward pass: one of two gradients is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return gradient, one


def test_a_constant_gradient_beside_another_is_welcome() -> None:
    class Balanced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tanh_net()

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            joined: Tensor = Auxiliary.apply(y, y.square().mean())
            return joined

    d, real, fake = Balanced(), randn(5, 3), fakes()
    ahead = UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=3
    ).unroll(fake, real)
    train(d, torch.optim.SGD(d.parameters(), lr=0.3), [(fake.detach(), real)] * 3, unroll.Minimax())
    for name, parameter in d.named_parameters():
        torch.testing.assert_close(ahead.parameters[name], parameter, rtol=1e-12, atol=1e-14)


def test_a_missing_derivative_of_the_objective_is_named() -> None:
    class Aligned(unroll.Minimax):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            score = discriminator(fake)
            classes = torch.cat([score, 2 * score, -score], 1)[:, None].log_softmax(-1)
            labels = torch.tensor([[1, 2]], device=DEVICE)
            lengths = torch.tensor([5]), torch.tensor([2])
            loss: Tensor = nn.functional.ctc_loss(classes, labels, *lengths)
            return loss

    d = tanh_net()
    with pytest.raises(
        RuntimeError, match=r"needs a derivative .*, in discriminator_loss of the objective.*stop_g"
    ):
        UnrolledGeneratorLoss(
            d, torch.optim.SGD(d.parameters(), lr=0.3), Aligned(), unroll_steps=2
        )(fakes(), randn(5, 3))


class Unseen(nn.Module):
    """It reads its weight from a list as a constant, of which no graph tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.weights, self.used = [self.layer.weight], True

    def forward(self, x: Tensor) -> Tensor:
        norm = self.weights[0].detach().norm()
        output: Tensor = self.head(torch.tanh(self.layer(x) / (norm if self.used else 2.0)))
        return output


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_a_constant_out_of_a_list_is_refused_where_it_matters(stop_gradient: bool) -> None:
    d = Unseen().to(DEVICE).double()
    options: Any = {"stop_gradient": stop_gradient}
    before = [(p.data_ptr(), p._version, p.detach().clone()) for p in d.parameters()]
    with pytest.raises(RuntimeError, match=r"uses D's parameter 'layer\.weight' other than"):
        UnrolledGeneratorLoss(
            d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2, **options
        )(fakes(), randn(5, 3))
    for p, (place, version, value) in zip(d.parameters(), before, strict=True):
        assert (p.data_ptr(), p._version) == (place, version)
        assert torch.equal(p, value)
    d.used = False
    assert UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2, **options
    )(fakes(), randn(5, 3)).isfinite()
    d.used = True
    d.layer.requires_grad_(False)  # it stands still, so that the constant is theta_D^k's
    optimizer = torch.optim.SGD(d.head.parameters(), lr=0.3)
    assert UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, **options)(
        fakes(), randn(5, 3)
    ).isfinite()


@pytest.mark.parametrize("method", ["discriminator_loss", "generator_loss"])
def test_a_constant_that_the_objective_keeps_is_refused(method: str) -> None:
    d, game = tanh_net(), unroll.Minimax()
    kept = list(d.parameters())

    def scaled(*batch: Any) -> Tensor:
        with torch.no_grad():
            scale = torch.stack([p.norm() for p in kept]).sum()
        loss: Tensor = getattr(game, method)(*batch)
        return loss / scale

    own: Any = {name: getattr(game, name) for name in ("discriminator_loss", "generator_loss")}
    objective = unroll.Losses(**own | {method: scaled})
    with pytest.raises(RuntimeError, match=r"uses D's parameter '0\.weight' other than"):
        UnrolledGeneratorLoss(
            d, torch.optim.SGD(d.parameters(), lr=0.3), objective, unroll_steps=2
        )(fakes(), randn(5, 3))
    if method == "generator_loss":
        assert UnrolledGeneratorLoss(
            d, torch.optim.SGD(d.parameters(), lr=0.3), objective, unroll_steps=0
        )(fakes(), randn(5, 3)).isfinite()


def test_gradients_that_are_no_derivatives_are_constants_without_the_second_term() -> None:
    d = Labelled(nn.Embedding(4, 4, scale_grad_by_freq=True)).to(DEVICE).double()
    labels = torch.tensor([0, 0, 1, 2, 0], device=DEVICE)
    fake, real = (randn(5, 4).requires_grad_(), labels), (randn(5, 4), labels)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.3)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, stop_gradient=True)
    value = loss(fake, real)
    train(d, optimizer, [((fake[0].detach(), labels), real)] * 2)
    loss.unroll_steps = 0
    torch.testing.assert_close(value, loss(fake, real), rtol=1e-12, atol=0)


class Thrifty(nn.Module):
    """A generator with what is refused of a D: it is not looked ahead in."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(5, 3, scale_grad_by_freq=True)
        self.layer = nn.Linear(3, 4)
        self.to(DEVICE, torch.float64)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.layer, z + self.classes(labels), use_reentrant=True)
        return hidden


@pytest.mark.parametrize("k", [0, 2])
def test_what_a_generator_does_is_its_own_matter(k: int) -> None:
    d, g = small(), Thrifty()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=k)
    z = randn(6, 3).requires_grad_()
    loss(g(z, torch.arange(6, device=DEVICE) % 5), randn(6, 4)).backward()
    assert all(p.grad is not None for p in g.parameters())


@pytest.mark.parametrize("options", [{}, {"stop_gradient": True}, {"checkpoint": True}])
@pytest.mark.parametrize("k", [0, 2])
def test_a_parameter_of_both_players_is_warned_of_once(k: int, options: dict[str, Any]) -> None:
    """Its gradient is that of a generator whose D has a copy."""
    d, latent, real = small(), randn(5, 3), randn(5, 4)
    generator = nn.Linear(3, 4).to(DEVICE).double()
    alike = copy.deepcopy(d)

    def gradient(of: nn.Module, *, warned: bool) -> Tensor:
        optimizer = torch.optim.SGD(of.parameters(), lr=0.3)
        loss = UnrolledGeneratorLoss(of, optimizer, unroll_steps=k, **options)
        shared = next(d.parameters())
        for _ in range(2):
            fake = generator(latent) * shared.sum()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                value = loss(fake, real)
            said = [str(w.message).startswith("fake, real: made with the") for w in caught]
            assert said == [True] * warned
            warned = False
        return torch.autograd.grad(value, shared)[0]

    assert torch.equal(gradient(d, warned=True), gradient(alike, warned=False))


@pytest.mark.parametrize("options", [{}, {"stop_gradient": True}])
def test_a_generator_loss_of_another_d_is_warned_of(options: dict[str, Any]) -> None:
    d = tanh_net()
    average = copy.deepcopy(d)

    class Averaged(unroll.NonSaturating):
        def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            return super().generator_loss(average, fake, real)

    optimizer = torch.optim.SGD(d.parameters(), lr=0.3)
    loss = UnrolledGeneratorLoss(d, optimizer, Averaged(), unroll_steps=2, **options)
    with pytest.warns(UserWarning, match=r"^objective: generator_loss does not depend on the dis"):
        loss(fakes(), randn(5, 3))
