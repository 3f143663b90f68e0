"""``gradient_terms`` and ``check_gradients``: pass on what is right, flag what is wrong."""

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torchopt.base import GradientTransformation

import unroll
from tests.players import batches, small, tanh_net, train
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from tests.verification.planted import HalfTanh as _HalfTanh
from tests.zoo import ZOO

Loss = unroll.UnrolledGeneratorLoss


def discriminator(*middle: nn.Module) -> nn.Sequential:
    layers = middle or (nn.Tanh(),)
    return nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 1)).to(DEVICE)


def batch(samples: int = 6) -> Tensor:
    return torch.randn(samples, 3, device=DEVICE)


class Game:
    """Minimax with one method replaced."""

    def __init__(self, **methods: Callable[..., Tensor]) -> None:
        game = unroll.Minimax()
        self.discriminator_loss = methods.get("discriminator_loss", game.discriminator_loss)
        self.generator_loss = methods.get("generator_loss", game.generator_loss)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_two_terms_sum_to_the_gradient(steps: int, resample: bool, average: bool) -> None:
    d, g = discriminator().double(), nn.Linear(4, 3).to(DEVICE).double()
    loss = Loss(d, torch.optim.Adam(d.parameters(), lr=0.01), unroll_steps=steps, average=average)
    z = torch.randn(6, 4, device=DEVICE, dtype=torch.float64)
    real = batch().double()
    fake = g(z)
    pairs = [(g(z + k), real + k) for k in range(steps)] if resample else None
    first, second = unroll.gradient_terms(loss, fake, real, g.parameters(), minibatches=pairs)
    loss(fake, real, minibatches=pairs).backward()
    for p, a, b in zip(g.parameters(), first, second, strict=True):
        torch.testing.assert_close(a + b, p.grad, rtol=1e-12, atol=1e-14)
        assert bool(b.any()) == (steps > 0)


def test_the_first_term_is_the_stop_gradient_one() -> None:
    d, g = discriminator().double(), nn.Linear(4, 3).to(DEVICE).double()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.5)
    z, real = torch.randn(6, 4, device=DEVICE, dtype=torch.float64), batch().double()
    first, _ = unroll.gradient_terms(Loss(d, optimizer, unroll_steps=3), g(z), real, g.parameters())
    Loss(d, optimizer, unroll_steps=3, stop_gradient=True)(g(z), real).backward()
    for p, a in zip(g.parameters(), first, strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-14)


def test_terms_of_an_unused_parameter_are_zeros() -> None:
    d, g = discriminator(), nn.Linear(4, 3).to(DEVICE)
    unused = torch.ones(2, requires_grad=True, device=DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), unroll_steps=2)
    fake = g(torch.randn(6, 4, device=DEVICE))
    terms = unroll.gradient_terms(loss, fake, batch(), [unused])
    assert [t.tolist() for (t,) in terms] == [[0.0, 0.0], [0.0, 0.0]]


def test_terms_need_both_terms() -> None:
    d = discriminator()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.5)
    fake = batch().requires_grad_()
    with pytest.raises(
        ValueError, match=r"loss: must have stop_gradient=False.*Make the loss with"
    ):
        unroll.gradient_terms(
            Loss(d, optimizer, unroll_steps=1, stop_gradient=True), fake, batch(), [fake]
        )
    loss = Loss(d, optimizer, unroll_steps=1)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"must run with gradients on.*no_grad"):
        unroll.gradient_terms(loss, fake, batch(), [fake])


def clipped() -> GradientTransformation:
    """A clip by the global norm which, as torchopt's own, detaches the norm."""

    def update(updates: Any, state: Any, **_: Any) -> Any:
        norm = float(torch.stack([g.square().sum() for g in updates]).sum().sqrt())
        return tuple(g * (0.05 / norm) for g in updates), state

    return GradientTransformation(lambda _: (), update)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch Adam": lambda d: torch.optim.Adam(d.parameters(), lr=0.01),
    "torch SGD": lambda d: torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9),
    "torchopt bare": lambda _: torchopt.chain(torchopt.nan_to_num(0.0), torchopt.rmsprop(0.01)),
    "torchopt Adam": lambda d: torchopt.Adam(d.parameters(), lr=0.01),
    "torchopt MetaAdam": lambda d: torchopt.MetaAdam(d, lr=0.01),
    "torchopt FuncOptimizer": lambda _: torchopt.FuncOptimizer(torchopt.adam(0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_right_gradients_pass_and_nothing_changes(name: str, stop_gradient: bool) -> None:
    d = discriminator(nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Dropout(0.3))
    optimizer = OPTIMIZERS[name](d)
    if isinstance(optimizer, torch.optim.Optimizer):
        unroll.Minimax().discriminator_loss(d, batch(), batch()).backward()
        optimizer.step()
    loss = Loss(d, optimizer, unroll_steps=3, stop_gradient=stop_gradient)
    before = copy.deepcopy(d.state_dict())
    report = unroll.check_gradients(loss, batch(), batch())
    assert report.ok, report
    assert report.relative_error < 1e-6
    assert all(torch.equal(before[k], v) for k, v in d.state_dict().items())
    assert not d._forward_pre_hooks


@pytest.mark.parametrize("name", ["torchopt MetaAdam", "torchopt FuncOptimizer"])
def test_parameters_and_states_in_a_graph_can_be_checked(name: str) -> None:
    d = discriminator()
    optimizer = OPTIMIZERS[name](d)
    value = unroll.Minimax().discriminator_loss(d, batch(), batch())
    if isinstance(optimizer, torchopt.MetaOptimizer):
        optimizer.step(value)
    else:
        optimizer.step(value, tuple(d.parameters()))
    assert unroll.check_gradients(Loss(d, optimizer, unroll_steps=2), batch(), batch()).ok


def test_the_global_generator_does_not_move() -> None:
    d = discriminator(nn.Dropout(0.5))
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.1), unroll_steps=2)
    fake, real = batch(), batch()
    before = torch.get_rng_state()
    assert unroll.check_gradients(loss, fake, real).ok
    assert torch.equal(before, torch.get_rng_state())


def test_minibatches_are_checked_too() -> None:
    d = discriminator()
    loss = Loss(d, torch.optim.Adam(d.parameters()), unroll_steps=2, average=True)
    pairs = [(batch(), batch()), (batch(), batch())]
    assert unroll.check_gradients(loss, batch(), batch(), minibatches=iter(pairs)).ok


# Their real steps leave tensors of a graph in the LSTM's list of weights.
@pytest.mark.parametrize("name", ZOO)
def test_every_animal_of_the_zoo_passes(name: str) -> None:
    animal = ZOO[name]
    d = animal.make()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01, betas=(0.5, 0.9), eps=1e-3)

    def draw() -> Any:
        return animal.feed(randn(5, *animal.shape))

    with sdpa_kernel(SDPBackend.MATH):  # the others cannot do R1 in a real step
        train(d, optimizer, [(draw(), draw())], animal.objective)
    loss = Loss(d, optimizer, animal.objective, unroll_steps=2)
    before = snapshot(d, optimizer)
    report = unroll.check_gradients(loss, draw(), draw())
    assert report.ok, report
    assert report.relative_error < 1e-6, report
    assert not changes(before, d, optimizer)


class HalfTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _HalfTanh.apply(x)
        return y


def flagged(loss: Loss, suspicion: str, verdict: str = "wrong") -> None:
    report = unroll.check_gradients(loss, batch(), batch())
    assert (report.verdict, report.ok) == (verdict, False)
    assert any(suspicion in s for s in report.suspicions), report


@pytest.mark.parametrize(
    "cut",
    [
        lambda fake: fake.clone().detach().requires_grad_(),
        lambda fake: torch.cat([fake[:3], fake[3:]]).data,
        lambda fake: torch.tensor(fake.tolist(), dtype=fake.dtype, device=fake.device),
    ],
    ids=["detach", "data", "tolist"],
)
def test_flags_fakes_that_are_detached_on_the_way(cut: Callable[[Tensor], Tensor]) -> None:
    d = discriminator()
    game = Game(
        discriminator_loss=lambda d, fake, real: unroll.Minimax().discriminator_loss(
            d, cut(fake), real
        )
    )
    flagged(Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), game, unroll_steps=3), "detaches")


def test_flags_detached_fakes() -> None:
    d = discriminator()
    game = Game(
        discriminator_loss=lambda d, fake, real: unroll.Minimax().discriminator_loss(
            d, fake.detach(), real
        )
    )
    flagged(Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), game, unroll_steps=3), "detaches")


@pytest.mark.parametrize("method", ["discriminator_loss", "generator_loss"])
def test_an_objective_that_closes_over_the_module_finds_theta_k_in_it(method: str) -> None:
    d = discriminator()
    before, state = dict(vars(d[0])), copy.deepcopy(d.state_dict())
    game = Game(**{method: lambda _, fake, real: d(fake).mean() - d(real).mean()})
    for unroll_steps in (0, 2):
        optimizer = torch.optim.SGD(d.parameters(), lr=0.5)
        loss = Loss(d, optimizer, game, unroll_steps=unroll_steps)
        report = unroll.check_gradients(loss, batch(), batch())
        assert report.ok, report
    assert vars(d[0]) == before
    assert all(torch.equal(p, state[name]) for name, p in d.state_dict().items())


def test_a_forward_pass_that_was_replaced_on_the_instance_is_no_mistake() -> None:
    d: Any = discriminator()
    own = d.forward
    d.forward = lambda x: own(x) * (1 + d[0].bias.mean())
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), unroll_steps=2)
    report = unroll.check_gradients(loss, batch(), batch())
    assert report.ok, report


class Holding:
    """An objective that keeps the module and calls that."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        return unroll.Minimax().discriminator_loss(self.module, fake, real)

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        return unroll.Minimax().generator_loss(discriminator, fake, real)


def test_an_objective_that_holds_the_module_finds_theta_k_in_it() -> None:
    d = discriminator()
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), Holding(d), unroll_steps=2)
    assert unroll.check_gradients(loss, batch(), batch()).ok


def test_samples_that_nothing_can_move_are_refused() -> None:
    d = discriminator()
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), unroll_steps=2)
    for dtype in (torch.complex64, torch.long):
        with pytest.raises(TypeError, match=r"^fake: must hold a floating-point tensor.*got \['to"):
            unroll.check_gradients(loss, batch().to(dtype), batch())


class Noisy(nn.Module):
    """A layer that draws from a generator that no one replays."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * (1 + self.draw())


ELSEWHERE: dict[str, Callable[[], Callable[[], float]]] = {
    "numpy": lambda: partial(np.random.default_rng(0).normal),
    "random": lambda: random.Random(0).random,
    "torch.Generator": lambda: partial(_draw, torch.Generator().manual_seed(0)),
}


def _draw(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


@pytest.mark.plain
@pytest.mark.parametrize("inside", ["objective", "discriminator"])
@pytest.mark.parametrize("source", ELSEWHERE)
def test_flags_randomness_outside_the_global_generators(source: str, inside: str) -> None:
    draw = ELSEWHERE[source]()
    d = discriminator(Noisy(draw)) if inside == "discriminator" else discriminator()
    game = Game(
        discriminator_loss=lambda d, fake, real: unroll.Minimax().discriminator_loss(
            d, fake + (draw() if inside == "objective" else 0.0), real
        )
    )
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), game, unroll_steps=2)
    flagged(loss, "draws from another generator", "inconclusive")


def test_flags_a_layer_with_a_wrong_second_derivative() -> None:
    d = discriminator(HalfTanh())
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), unroll_steps=3)
    flagged(loss, "second derivative of layer 1 (HalfTanh)")


def test_names_a_wrong_layer_deep_inside() -> None:
    d = discriminator(nn.Tanh(), nn.Sequential(nn.Linear(8, 8), HalfTanh()))
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), unroll_steps=3)
    report = unroll.check_gradients(loss, batch(), batch())
    assert [s.split(" (rel")[0] for s in report.suspicions] == [
        "wrong second derivative of layer 2.1 (HalfTanh)"
    ]


class HalfForward(nn.Module):
    """The wrong function outside all layers, in D's own forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(_HalfTanh.apply(self.body(x)))
        return output


def test_flags_a_wrong_second_derivative_in_the_discriminators_own_forward() -> None:
    d = HalfForward().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), unroll_steps=3)
    flagged(loss, "(HalfForward)")


def test_flags_a_clip_that_detaches() -> None:
    d = discriminator()
    loss = Loss(d, torchopt.chain(clipped(), torchopt.sgd(0.5)), unroll_steps=3)
    flagged(loss, "derivative of the optimizer's update")


def test_flags_a_clip_that_detaches_inside_a_chain() -> None:
    """After Adam's own transformation, live in an Optimizer."""
    d = discriminator()
    optimizer = torchopt.Optimizer(d.parameters(), torchopt.chain(torchopt.adam(0.05), clipped()))
    flagged(Loss(d, optimizer, unroll_steps=3), "derivative of the optimizer's update")


def test_flags_a_clip_in_a_gradient_hook_that_detaches() -> None:
    d = discriminator()
    for p in d.parameters():
        p.register_hook(lambda g: g * (0.05 / g.norm().detach()))
    flagged(Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), unroll_steps=3), "hook")


def test_a_clip_that_keeps_its_norm_passes() -> None:
    """The same projections and clips, with the norm in the graph."""
    d = discriminator()

    def update(updates: Any, state: Any, **_: Any) -> Any:
        norm = torch.stack([g.square().sum() for g in updates]).sum().sqrt()
        return tuple(g * (0.05 / norm) for g in updates), state

    clip = torchopt.chain(GradientTransformation(lambda _: (), update), torchopt.sgd(0.5))
    loss = Loss(
        d, clip, unroll_steps=3, project=lambda theta: {k: p / p.norm() for k, p in theta.items()}
    )
    assert unroll.check_gradients(loss, batch(), batch()).ok


def test_flags_a_projection_that_detaches() -> None:
    d = discriminator()
    loss = Loss(
        d,
        torch.optim.SGD(d.parameters(), lr=0.5),
        unroll_steps=3,
        project=lambda theta: {k: p / p.norm().detach() for k, p in theta.items()},
    )
    flagged(loss, "derivative of project=")


def test_flags_a_gradient_that_is_not_finite() -> None:
    d = discriminator()
    game = Game(generator_loss=lambda _, fake, __: (fake - fake.detach()).square().sum().sqrt())
    flagged(Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), game, unroll_steps=1), "not finite")


def test_flags_a_value_that_is_not_finite() -> None:
    d = discriminator()
    game = Game(generator_loss=lambda d, fake, _: d(fake).mean() * float("inf"))
    flagged(
        Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), game, unroll_steps=1),
        "f_K itself is",
        "inconclusive",
    )


def test_errors_of_the_user_pass_through() -> None:
    d = discriminator()
    failure = KeyError("mine")

    def fail(*_: Any) -> Tensor:
        raise failure

    loss = Loss(
        d, torch.optim.SGD(d.parameters(), lr=0.5), Game(generator_loss=fail), unroll_steps=1
    )
    with pytest.raises(KeyError, match="mine") as caught:
        unroll.check_gradients(loss, batch(), batch())
    assert caught.value is failure


class Donating(torch.autograd.Function):
    """What torch.compile's backward pass does where it is to be kept for a second one."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, __: Tensor) -> Tensor:
        raise RuntimeError("This backward function was compiled with non-empty donated buffers")


def test_the_terms_of_a_compiled_generator_are_refused_by_name() -> None:
    d, g = tanh_net(), nn.Linear(2, 3).to(DEVICE).double()
    fake: Tensor = Donating.apply(g(randn(5, 2)))
    with pytest.raises(RuntimeError, match=r"compiled generator.*generator\._orig_mod"):
        unroll.gradient_terms(
            Loss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=1),
            fake,
            randn(5, 3),
            g.parameters(),
        )


def test_the_terms_of_a_frozen_parameter_are_zeros() -> None:
    d, g = tanh_net(), nn.Linear(2, 3).to(DEVICE).double()
    g.weight.requires_grad_(False)
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=1)
    first, second = unroll.gradient_terms(loss, g(randn(5, 2)), randn(5, 3), g.parameters())
    assert not first[0].any()
    assert not second[0].any()
    assert first[1].any()


def test_code_that_names_its_type_passes_where_it_is_recomputed() -> None:
    class Smoothed:
        def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            label = torch.full((len(real), 1), 0.9, device=DEVICE)
            of_real: Tensor = binary_cross_entropy_with_logits(d(real), label)
            return of_real + softplus(d(fake).float()).mean()

        def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            loss: Tensor = -d(fake).mean()
            return loss

    d = nn.Linear(4, 1).to(DEVICE)
    loss = unroll.UnrolledGeneratorLoss(
        *(d, torch.optim.SGD(d.parameters(), 0.3), Smoothed()), unroll_steps=2, checkpoint=True
    )
    assert unroll.check_gradients(loss, randn(6, 4).float(), randn(6, 4).float()).ok


def test_a_projection_in_place_is_not_blamed() -> None:
    class Halved(unroll.Minimax):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            return super().discriminator_loss(discriminator, (fake + fake.detach()) / 2, real)

    def clamped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for t in tensors.values():
            t.clamp_(-0.3, 0.3)
        return tensors

    d, ((fake, real),) = small(), batches(1)
    optimizer = torch.optim.SGD(d.parameters(), 0.5)
    for argument in ("project", "transform_gradients"):
        given: dict[str, Any] = {argument: clamped}
        loss = unroll.UnrolledGeneratorLoss(d, optimizer, Halved(), unroll_steps=3, **given)
        report = unroll.check_gradients(loss, fake, real)
        assert report.verdict == "wrong"
        assert not any(argument in text for text in report.suspicions)
