"""Faults that are silent elsewhere: each gives the right number here, or an error that says so."""

import copy
import gc
from collections import deque
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_map

import unroll
from tests.players import train
from tests.settings import DEVICE, randn
from tests.zoo_networks import Labelled

Loss = unroll.UnrolledGeneratorLoss


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DEVICE).double()


def sgd(d: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(d.parameters(), lr=0.3)


def fakes() -> Tensor:
    return randn(5, 3).requires_grad_()


def test_an_in_place_root_in_a_transformation_is_in_place() -> None:
    def update(updates: Any, state: Any, **_: Any) -> Any:
        def step(g: Tensor) -> Tensor:
            v = g * g + 1e-4
            v.sqrt_()
            return -0.1 * g / v

        return tree_map(step, updates), state

    d, real, fake = net(), randn(5, 3), randn(5, 3)
    ahead = Loss(d, GradientTransformation(lambda _: (), update), unroll_steps=1).unroll(fake, real)
    theta = list(d.parameters())
    value = unroll.Minimax().discriminator_loss(d, fake, real)
    updates, _ = update(torch.autograd.grad(value, theta), ())
    for p, u, q in zip(theta, updates, ahead.parameters.values(), strict=True):
        torch.testing.assert_close(q, p + u, rtol=1e-12, atol=0)


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
        Loss(d, sgd(d), unroll_steps=2)(fakes(), randn(5, 3))
    assert d.layer.weight.grad is None


def in_no_grad(theta: Any) -> Any:
    with torch.no_grad():
        for p in theta.values():
            p.clamp_(-0.01, 0.01)
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
    d = net()
    with pytest.raises(
        ValueError, match=r"project: must be differentiable; it changed '0\.weight'"
    ):
        Loss(d, sgd(d), unroll_steps=2, project=project)(fakes(), randn(5, 3))


class InputGradient(unroll.Minimax):
    """The generator minimises a gradient norm, which takes one derivative more."""

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(discriminator(fake).sum(), fake, create_graph=True)
        loss: Tensor = gradient.square().sum()
        return loss


def test_weight_norm_is_right_in_the_generator_loss_too() -> None:
    d = net()
    weight_norm(d[0])
    loss = Loss(d, sgd(d), InputGradient(), unroll_steps=2)
    assert unroll.check_gradients(loss, fakes(), fakes()).ok


def test_complex_parameters_are_refused() -> None:
    d = nn.Linear(3, 1, dtype=torch.complex128)
    with pytest.raises(TypeError, match=r"parameter 'weight' is complex.*real and imaginary"):
        Loss(d, sgd(d), unroll_steps=1)


@pytest.mark.parametrize("penalty", [unroll.R1(1.0), unroll.R2(1.0), unroll.GradientPenalty(1.0)])
def test_penalties_take_samples_that_are_numbers(penalty: Any) -> None:
    class Dirac(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.psi = nn.Parameter(torch.ones((), device=DEVICE, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.psi * x

    d = Dirac()
    loss = Loss(d, sgd(d), unroll.Minimax() + penalty, unroll_steps=1)
    assert loss(randn(5).requires_grad_(), randn(5)).isfinite()


def test_the_terms_of_a_frozen_parameter_are_zeros() -> None:
    d, g = net(), nn.Linear(2, 3).to(DEVICE).double()
    g.weight.requires_grad_(False)
    loss = Loss(d, sgd(d), unroll_steps=1)
    first, second = unroll.gradient_terms(loss, g(randn(5, 2)), randn(5, 3), g.parameters())
    assert not first[0].any()
    assert not second[0].any()
    assert first[1].any()


def test_a_detached_look_ahead_does_not_count_as_the_inspected_one() -> None:
    d = FromAList().to(DEVICE).double()
    loss = Loss(d, sgd(d), unroll_steps=2)
    loss.unroll(randn(5, 3), randn(5, 3))
    with pytest.raises(RuntimeError, match=r"uses D's parameter 'layer\.weight' other than"):
        loss(fakes(), randn(5, 3))


def test_a_projection_of_a_partly_frozen_discriminator_is_no_mistake() -> None:
    d = net()
    d[0].requires_grad_(False)
    optimizer = torch.optim.SGD(d[2].parameters(), lr=0.3)

    def clip(theta: Any) -> Any:
        return {name: p.clamp(-0.1, 0.1) for name, p in theta.items()}

    loss = Loss(d, optimizer, unroll_steps=2, project=clip)
    assert unroll.check_gradients(loss, fakes(), fakes()).ok
    assert loss(fakes(), randn(5, 3)).isfinite()


class Lookahead(torch.optim.Optimizer):
    """A wrapper with a step of its own, which nobody must look through."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


def test_a_wrapper_with_a_step_of_its_own_is_refused() -> None:
    d = net()
    with pytest.raises(TypeError, match=r"no differentiable form of .*Lookahead is known"):
        Loss(d, Lookahead(sgd(d)), unroll_steps=1)


def test_step_hooks_are_warned_of() -> None:
    d = net()
    optimizer = sgd(d)
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"optimizer: has step hooks.*project="):
        Loss(d, optimizer, unroll_steps=1)


def test_gradient_hooks_of_parameters_run_in_the_look_ahead() -> None:
    d, real, fake = net(), randn(5, 3), randn(5, 3)
    for p in d.parameters():
        p.register_hook(lambda g: g.clamp(-0.01, 0.01))
    optimizer = sgd(d)
    loss = Loss(d, optimizer, unroll_steps=2)
    ahead = loss.unroll(fake, real).parameters
    for _ in range(2):
        optimizer.zero_grad()
        unroll.Minimax().discriminator_loss(d, fake, real).backward()
        optimizer.step()
    for name, p in d.named_parameters():
        torch.testing.assert_close(ahead[name], p.detach(), rtol=1e-12, atol=0)


def test_the_callers_saved_tensor_hooks_are_welcome() -> None:
    d, real, fake = net(), randn(5, 3), fakes()
    loss = Loss(d, sgd(d), unroll_steps=2)
    (plain,) = torch.autograd.grad(loss(fake, real), fake)
    with torch.autograd.graph.save_on_cpu():
        (saved,) = torch.autograd.grad(loss(fake, real), fake)
    whole = torch.utils.checkpoint.checkpoint(partial(loss, real=real), fake, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(whole, fake)
    assert torch.equal(plain, saved)
    assert torch.equal(plain, recomputed)


def test_look_aheads_in_several_threads() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            d = net()
            loss = Loss(d, sgd(d), unroll_steps=3)
            for _ in range(10):
                loss(fakes(), randn(5, 3)).backward()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("method", ["discriminator_loss", "generator_loss"])
def test_a_loss_of_parameters_that_it_keeps_is_refused(method: str) -> None:
    d = net()
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
        Loss(d, sgd(d), objective, unroll_steps=1)(fakes(), randn(5, 3))


def test_cached_parametrizations_are_evaluated_at_every_step() -> None:
    d, real, fake = net(), randn(5, 3), fakes()
    weight_norm(d[0])
    loss = Loss(d, sgd(d), unroll_steps=3)
    value = loss(fake, real)
    with parametrize.cached():
        assert torch.equal(loss(fake, real), value)
        assert parametrize._cache_enabled


def test_a_saturated_discriminator_is_said_to_be_too_sure_to_check() -> None:
    d = net()
    head = d[2]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias.fill_(-20.0)
    report = unroll.check_gradients(Loss(d, sgd(d), unroll_steps=3), fakes(), randn(5, 3))
    assert not report.ok
    assert report.verdict == "inconclusive"
    assert "round-off of f_K" in report.suspicions[0]


def test_a_root_written_as_a_power_has_a_finite_slope() -> None:
    def update(updates: Any, state: Any, **_: Any) -> Any:
        return tree_map(lambda g: -0.1 * g / ((g * g) ** 0.5 + 1e-8), updates), state

    d = net()
    fake = fakes()
    impl = GradientTransformation(lambda _: (), update)
    loss = Loss(d, impl, unroll.Wasserstein(), unroll_steps=1)  # the output bias has no gradient
    loss(fake, randn(5, 3)).backward()
    assert fake.grad is not None
    assert fake.grad.isfinite().all()


def test_a_where_of_ones_own_beside_adagrad() -> None:
    def update(updates: Any, state: Any, **_: Any) -> Any:
        return tree_map(lambda g: g * (len(torch.where(g > 0)) > 0), updates), state

    d = net()
    impl = torchopt.chain(GradientTransformation(lambda _: (), update), torchopt.adagrad(0.1))
    assert unroll.check_gradients(Loss(d, impl, unroll_steps=2), fakes(), randn(5, 3)).ok


def test_a_detaching_clip_in_a_partial_is_refused() -> None:
    d, clip = net(), torchopt.clip_grad_norm(1.0)
    hidden = GradientTransformation(clip.init, partial(clip.update))
    with pytest.raises(ValueError, match=r"torchopt\.clip_grad_norm detaches"):
        Loss(d, torchopt.chain(hidden, torchopt.sgd(0.1)), unroll_steps=1)


class Diary(nn.Module):
    """It writes down what it sees, in containers within containers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.last: deque[float] = deque(maxlen=5)
        self.pages: dict[str, list[float]] = {"means": []}

    def forward(self, x: Tensor) -> Tensor:
        self.last.append(x.mean().item())
        self.pages["means"].append(x.mean().item())
        output: Tensor = self.layer(x)
        return output


def test_nested_containers_are_given_back() -> None:
    d = Diary().to(DEVICE).double()
    Loss(d, sgd(d), unroll_steps=2)(fakes(), randn(5, 3)).backward()
    assert not d.last
    assert d.pages == {"means": []}


def test_points_on_the_way_are_not_kept() -> None:
    alive: list[int] = []

    def count(theta: Any) -> Any:
        alive.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
        return theta

    d = net()
    loss = Loss(d, sgd(d), unroll_steps=20, stop_gradient=True, project=count)
    loss(fakes(), randn(5, 3))
    assert alive[-1] <= alive[2] + 20  # the losses, one number a step


def test_a_frozen_discriminator_with_an_integer_parameter() -> None:
    d = net()
    d.register_parameter("level", nn.Parameter(torch.zeros(2, dtype=torch.int8), False))
    d.requires_grad_(False)
    loss = Loss(d, sgd(d), unroll_steps=1)
    assert loss(fakes(), randn(5, 3)).isfinite()


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
    d, fake, real = net(), fakes(), randn(5, 3)
    loss = Loss(d, sgd(d), PenaltyOnFakes(), unroll_steps=3, checkpoint=checkpoint)
    ahead = loss.unroll(fake, real)
    copied = copy.deepcopy(d)
    train(copied, sgd(copied), [(fake.detach(), real)] * 3, PenaltyOnFakes())
    for name, parameter in copied.named_parameters():
        torch.testing.assert_close(ahead.parameters[name], parameter, rtol=1e-12, atol=1e-14)

    wanted = PenaltyOnFakes().generator_loss(copied, fake.detach().requires_grad_(), real)
    torch.testing.assert_close(loss(fake, real), wanted, rtol=1e-12, atol=1e-14)
    if not checkpoint:
        report = unroll.check_gradients(loss, fake, real)
        assert report.ok, report


class Faint:
    """A game whose generator's loss is far larger than its slope, which is a little wrong."""

    def discriminator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        return unroll.Minimax().discriminator_loss(discriminator, fake, real)

    def generator_loss(self, discriminator: Any, fake: Tensor, real: Tensor) -> Tensor:
        loss: Tensor = discriminator(fake).mean()
        return 1.0 + 1e-4 * (loss + 1e-3 * loss.detach())


def test_a_wrong_gradient_does_not_hide_in_the_round_off_of_small_steps() -> None:
    d = net()
    report = unroll.check_gradients(Loss(d, sgd(d), Faint(), unroll_steps=2), fakes(), randn(5, 3))
    assert not report.ok
    assert report.relative_error > 1e-4


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
        Loss(d, sgd(d), game, unroll_steps=2)(fakes(), randn(5, 3))


def test_without_the_second_term_it_is_not_needed() -> None:
    layers = nn.Linear(3, 4), Cubed("of autograd"), nn.Linear(4, 1)
    known = nn.Sequential(*layers).to(DEVICE).double()
    d = copy.deepcopy(known)
    vars(d[1]).update(how="in NumPy")
    fake, real = fakes(), randn(5, 3)
    losses = [Loss(one, sgd(one), unroll_steps=2, stop_gradient=True) for one in (d, known)]
    torch.testing.assert_close(*[torch.autograd.grad(loss(fake, real), fake) for loss in losses])
    assert unroll.check_gradients(Loss(known, sgd(known), unroll_steps=2), fake, real).ok


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
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            joined: Tensor = Auxiliary.apply(y, y.square().mean())
            return joined

    d, real, fake = Balanced(), randn(5, 3), fakes()
    ahead = Loss(d, sgd(d), unroll_steps=3).unroll(fake, real)
    train(d, sgd(d), [(fake.detach(), real)] * 3, unroll.Minimax())
    for name, parameter in d.named_parameters():
        torch.testing.assert_close(ahead.parameters[name], parameter, rtol=1e-12, atol=1e-14)


class Applied(nn.Module):
    """A D with a function of hidden units and a weight in its middle."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.body, self.head = function, nn.Linear(3, 4), nn.Linear(4, 1)
        self.weight = nn.Parameter(torch.linspace(1, 2, 16).view(4, 4))
        self.to(DEVICE).double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.function(self.body(x), self.weight)))
        return output


ATEN = torch.ops.aten
PENALISED = unroll.Minimax() + unroll.R1(1.0)
HIDDEN: dict[str, tuple[Any, Any]] = {  # as torch.export and torch.jit call them, and the game
    "weight norm": (
        lambda x, w: x @ ATEN._weight_norm(w, torch.ones_like(w[:, :1]), 0).t(),
        unroll.Minimax(),
    ),
    "layer norm": (lambda x, w: ATEN.layer_norm(x, [4], w[0]), PENALISED),
    "layer norm, overload": (
        lambda x, w: ATEN.native_layer_norm.default(x, [4], w[0], None, 1e-5)[0],
        PENALISED,
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_norm_that_cannot_be_replaced_is_refused_where_its_derivative_is_wrong(name: str) -> None:
    function, game = HIDDEN[name]
    d, fake, real = Applied(function), fakes(), randn(5, 3)
    pattern = r"PyTorch's derivative of \w+Norm\w+ is wrong.*Call torch\.nn\.functional"
    with pytest.raises(RuntimeError, match=pattern):
        Loss(d, sgd(d), game, unroll_steps=2)(fake, real)
    assert Loss(d, sgd(d), game, unroll_steps=2, stop_gradient=True)(fake, real).isfinite()


def test_a_layer_norm_is_right_however_it_is_called_where_there_is_no_penalty() -> None:
    fake, real = fakes(), randn(5, 3)
    found = []
    for function in (HIDDEN["layer norm"][0], lambda x, w: torch.layer_norm(x, [4], w[0])):
        torch.manual_seed(0)
        d = Applied(function)
        found.append(torch.autograd.grad(Loss(d, sgd(d), unroll_steps=2)(fake, real), fake))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


def test_gradients_that_are_no_derivatives_are_constants_without_the_second_term() -> None:
    d = Labelled(nn.Embedding(4, 4, scale_grad_by_freq=True)).to(DEVICE).double()
    labels = torch.tensor([0, 0, 1, 2, 0], device=DEVICE)
    fake, real = (fakes().repeat(1, 2)[:, :4], labels), (randn(5, 4), labels)
    loss = Loss(d, sgd(d), unroll_steps=2, stop_gradient=True)
    value = loss(fake, real)
    train(d, sgd(d), [((fake[0].detach(), labels), real)] * 2)
    torch.testing.assert_close(
        value, Loss(d, sgd(d), unroll_steps=0)(fake, real), rtol=1e-12, atol=0
    )


def test_a_missing_derivative_of_the_objective_is_named() -> None:
    class Aligned(unroll.Minimax):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            score = discriminator(fake)
            classes = torch.cat([score, 2 * score, -score], 1)[:, None].log_softmax(-1)
            labels = torch.tensor([[1, 2]], device=DEVICE)
            lengths = torch.tensor([5]), torch.tensor([2])
            loss: Tensor = nn.functional.ctc_loss(classes, labels, *lengths)
            return loss

    d = net()
    with pytest.raises(
        RuntimeError, match=r"needs a derivative .*, in discriminator_loss of the objective.*stop_g"
    ):
        Loss(d, sgd(d), Aligned(), unroll_steps=2)(fakes(), randn(5, 3))


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
        Loss(d, sgd(d), unroll_steps=2, **options)(fakes(), randn(5, 3))
    for p, (place, version, value) in zip(d.parameters(), before, strict=True):
        assert (p.data_ptr(), p._version) == (place, version)
        assert torch.equal(p, value)
    d.used = False
    assert Loss(d, sgd(d), unroll_steps=2, **options)(fakes(), randn(5, 3)).isfinite()
    d.used = True
    d.layer.requires_grad_(False)  # it stands still, so that the constant is theta_D^k's
    optimizer = sgd(d.head)
    assert Loss(d, optimizer, unroll_steps=2, **options)(fakes(), randn(5, 3)).isfinite()


@pytest.mark.parametrize("method", ["discriminator_loss", "generator_loss"])
def test_a_constant_that_the_objective_keeps_is_refused(method: str) -> None:
    d, game = net(), unroll.Minimax()
    kept = list(d.parameters())

    def scaled(*batch: Any) -> Tensor:
        with torch.no_grad():
            scale = torch.stack([p.norm() for p in kept]).sum()
        loss: Tensor = getattr(game, method)(*batch)
        return loss / scale

    own: Any = {name: getattr(game, name) for name in ("discriminator_loss", "generator_loss")}
    objective = unroll.Losses(**own | {method: scaled})
    with pytest.raises(RuntimeError, match=r"uses D's parameter '0\.weight' other than"):
        Loss(d, sgd(d), objective, unroll_steps=2)(fakes(), randn(5, 3))
    if method == "generator_loss":
        assert Loss(d, sgd(d), objective, unroll_steps=0)(fakes(), randn(5, 3)).isfinite()
