"""Every transformation that torchopt offers: exact, or refused by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torchopt.base import GradientTransformation, identity
from torchopt.pytree import tree_leaves, tree_map

import unroll
from tests import oracles
from tests.games import Game
from tests.players import LR, batches, deep, fakes, tanh_net, train
from tests.settings import randn
from tests.snapshot import changes, snapshot
from tests.test_live import TwoHeads, assert_close, looked_ahead
from unroll import UnrolledGeneratorLoss

transform: Any = torchopt.transform
schedule = torchopt.schedule
chain = torchopt.chain


def matrices(parameters: Any) -> Any:
    """Return the mask of all but the biases."""
    return tree_map(lambda p: p.ndim != 1, parameters)


def fixed(d: nn.Module) -> Any:
    """Return that mask as a tree that is there from the start."""
    return tuple(p.ndim != 1 for p in d.parameters())


def clip(largest: float) -> GradientTransformation:
    """Return a user's own transformation: clipping that keeps the norm in the graph."""

    def update(updates: Any, state: Any, **_: Any) -> Any:
        norm = torch.stack([g.square().sum() for g in tree_leaves(updates)]).sum().sqrt()
        return tree_map(lambda g: g * (largest / norm).clamp(max=1.0), updates), state

    return GradientTransformation(lambda _: (), update)


def counting() -> GradientTransformation:
    """Return a user's own transformation, which counts its steps in its state."""

    def update(updates: Any, state: Any, **_: Any) -> Any:
        (steps,) = state
        return tree_map(lambda g: -g / (steps + 1), updates), (steps + 1,)

    return GradientTransformation(lambda _: (torch.zeros(()),), update)


S = LR  # a step size at which the deep D of the parity tests is well conditioned
EXACT: dict[str, Callable[[nn.Module], GradientTransformation]] = {
    "sgd": lambda _: torchopt.sgd(S, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "adam": lambda _: torchopt.adam(S),
    "adamw": lambda _: torchopt.adamw(S, weight_decay=0.3, maximize=True),
    "adamax": lambda _: torchopt.adamax(S),
    "adadelta": lambda _: torchopt.adadelta(1.0),
    "adagrad": lambda _: torchopt.adagrad(S, initial_accumulator_value=0.1),
    "radam": lambda _: torchopt.radam(S),
    "rmsprop": lambda _: torchopt.rmsprop(S / 10, momentum=0.5, nesterov=True),
    "trace": lambda _: chain(transform.trace(0.9, 0.3), transform.scale(-S)),
    "trace nesterov": lambda _: chain(transform.trace(0.9, nesterov=True), transform.scale(-S)),
    "scale": lambda _: transform.scale(-S),
    "scale_by_schedule exponential_decay": lambda _: transform.scale_by_schedule(
        schedule.exponential_decay(-S, 0.9)
    ),
    "scale_by_schedule in stairs": lambda _: transform.scale_by_schedule(
        schedule.exponential_decay(-S, 0.9, transition_steps=2, staircase=True)
    ),
    "polynomial_schedule": lambda _: torchopt.adam(
        schedule.polynomial_schedule(S, S / 10, 2, 5, 0)
    ),
    "linear_schedule": lambda _: torchopt.sgd(schedule.linear_schedule(S, S / 10, 5, 0)),
    "add_decayed_weights": lambda _: chain(
        transform.add_decayed_weights(0.3, matrices), transform.scale(-S)
    ),
    "add_decayed_weights by a tree": lambda d: chain(
        transform.add_decayed_weights(0.3, fixed(d)), transform.scale(-S)
    ),
    "masked scale_by_adam": lambda _: chain(
        transform.masked(transform.scale_by_adam(), matrices), transform.scale(-S)
    ),
    "masked sgd": lambda d: transform.masked(torchopt.sgd(S, momentum=0.8), fixed(d)),
    "adamw masked by hand": lambda _: chain(
        transform.scale_by_adam(),
        transform.masked(transform.add_decayed_weights(0.3), matrices),
        transform.scale(-S),
    ),
    "scale_by_adamax": lambda _: chain(transform.scale_by_adamax(), transform.scale(-S)),
    "scale_by_adadelta": lambda _: chain(transform.scale_by_adadelta(), transform.scale(-1.0)),
    "scale_by_radam": lambda _: chain(transform.scale_by_radam(), transform.scale(-S)),
    "scale_by_rss": lambda _: chain(transform.scale_by_rss(0.1), transform.scale(-S)),
    "scale_by_rms": lambda _: chain(transform.scale_by_rms(), transform.scale(-S / 10)),
    "scale_by_stddev": lambda _: chain(transform.scale_by_stddev(), transform.scale(-S / 10)),
    "nan_to_num": lambda _: chain(torchopt.nan_to_num(0.0, 1.0, -1.0), transform.scale(-S)),
    "chain_flat": lambda _: torchopt.combine.chain_flat(
        transform.scale_by_adam.flat(), transform.scale.flat(-S)
    ),
    "chain of a method": lambda _: transform.trace(0.9).chain(transform.scale(-S)),
    "identity": lambda _: chain(identity(), torchopt.sgd(S)),
    "own clip": lambda _: chain(clip(0.1), torchopt.adam(S)),
    "own count": lambda _: chain(transform.trace(0.5), transform.scale(S), counting()),
}
REFUSED: dict[str, tuple[Callable[[nn.Module], GradientTransformation], str]] = {
    "clip_grad_norm": (
        lambda _: chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(S)),
        r"clip_grad_norm detaches the norm.*Clip inside a transformation of your own",
    ),
    "register_hook": (
        lambda _: chain(torchopt.register_hook(torchopt.hook.zero_nan_hook), torchopt.sgd(S)),
        r"register_hook changes gradients.*Leave it out",
    ),
    "scale_by_accelerated_adam": (
        lambda _: transform.scale_by_accelerated_adam(),
        r"inexact derivative.*use_accelerated_op=False",
    ),
    "adam use_accelerated_op": (
        lambda _: torchopt.adam(S, use_accelerated_op=True),
        r"inexact derivative.*use_accelerated_op=False",
    ),
    "masked.flat": (
        lambda _: transform.masked.flat(transform.trace.flat(), matrices),
        r"flat masks.*fail in torchopt's own step too.*Build it as",
    ),
    "adamw mask": (
        lambda d: torchopt.adamw(S, mask=[p.ndim != 1 for p in d.parameters()]),
        r"flat masks.*fail in torchopt's own step too.*Build it as",
    ),
}
CLASSES = ["SGD", "Adam", "AdaMax", "AdaDelta", "RAdam", "AdamW", "AdaGrad", "RMSProp"]


def test_every_public_name_is_tested() -> None:
    modules = (torchopt.transform, torchopt.alias, torchopt.combine, torchopt.clip)
    names = {name for module in modules for name in module.__all__} | {"register_hook", "identity"}
    words = {word for name in (*EXACT, *REFUSED) for word in name.split()}
    assert names - {"chain"} <= words
    classes = [
        name
        for name, value in vars(torchopt).items()
        if isinstance(value, type)
        and issubclass(value, (torchopt.Optimizer, torchopt.MetaOptimizer))
    ]
    spelled = {name.removeprefix("Meta").lower() for name in classes} - {"optimizer"}
    assert spelled == {name.lower() for name in CLASSES}


def check_differences(game: Game, optimizer: Any, warm: int) -> None:
    """Compare f_3's gradient with central differences."""
    arguments = game.warmed(optimizer, warm)
    loss = unroll.UnrolledGeneratorLoss(game.discriminator, optimizer, unroll_steps=3)

    def surrogate(theta: Tensor) -> Tensor:
        value: Tensor = loss(game.fake(theta), game.real[0], **arguments)
        return value

    theta = game.theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(theta), theta)
    assert oracles.relative_error(surrogate, game.theta, gradient) <= 1e-6


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", EXACT)
def test_central_differences(name: str, warm: int) -> None:
    game = Game(3)
    check_differences(game, EXACT[name](game.discriminator), warm)


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", [*CLASSES, *(f"Meta{name}" for name in CLASSES)])
def test_central_differences_of_the_classes(name: str, warm: int) -> None:
    game = Game(3)
    d: Any = game.discriminator if name.startswith("Meta") else game.discriminator.parameters()
    check_differences(game, getattr(torchopt, name)(d, 1.0 if "Delta" in name else 0.03), warm)


@pytest.mark.parametrize("warm", [0, 3])
def test_central_differences_of_moments_that_require_gradients(warm: int) -> None:
    game = Game(3)
    impl = chain(
        transform.trace(0.9, nesterov=True, moment_requires_grad=True),
        torchopt.adam(S, moment_requires_grad=True),
    )
    check_differences(game, torchopt.MetaOptimizer(game.discriminator, impl), warm)


KINDS: dict[str, Callable[[nn.Module, GradientTransformation], Any]] = {
    "Optimizer": lambda d, impl: torchopt.Optimizer(d.parameters(), impl),
    "MetaOptimizer": torchopt.MetaOptimizer,
    "FuncOptimizer": lambda _, impl: torchopt.FuncOptimizer(impl),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT)
def test_k_steps_are_real_steps(name: str, kind: str) -> None:
    """Its state is live, ``first_call`` in its closure included, and is left as it was."""
    (pair,) = batches(1)
    torch.manual_seed(0)
    d = deep()
    optimizer = KINDS[kind](d, EXACT[name](d))
    train(d, optimizer, batches(2, seed=1))
    loss = looked_ahead(d, optimizer, 3)
    first, second = (loss.unroll(*pair) for _ in range(2))
    assert_close(second.parameters, first.parameters, 0.0)
    train(d, optimizer, [pair] * 3)
    assert_close(first.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_parameters_without_a_gradient_are_skipped(name: str) -> None:
    """Torchopt's masks cannot do that, here or in training: the look-ahead says so."""
    torch.manual_seed(0)
    d = TwoHeads()
    optimizer = torchopt.Optimizer(d.parameters(), EXACT[name](d))
    pairs = [({"x": fake, "head": 1}, {"x": real, "head": 1}) for fake, real in batches(3)]
    loss = looked_ahead(d, optimizer, 3)
    if "masked" in name or "add_decayed_weights" in name:
        with pytest.raises(ValueError, match=r"optimizer: .*masked cannot.*'unused\.weight'.*Give"):
            loss.unroll(*pairs[0], minibatches=pairs)
        with pytest.raises(ValueError, match="Expected"):
            train(d, optimizer, pairs)
        return
    before = d.get_parameter("heads.0.weight").detach().clone()
    ahead = loss.unroll(*pairs[0], minibatches=pairs)
    assert torch.equal(ahead.parameters["heads.0.weight"], before)
    train(d, optimizer, pairs)
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


@pytest.mark.parametrize("kind", [*KINDS, "bare"])
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, kind: str) -> None:
    build, message = REFUSED[name]
    d = nn.Linear(4, 1)
    if kind != "bare" and name == "masked.flat":  # torchopt's init fails in the user's hands
        return
    impl = build(d)
    optimizer = impl if kind == "bare" else KINDS[kind](d, impl)
    with pytest.raises(ValueError, match=f"optimizer: .*{message}"):
        looked_ahead(d, optimizer, 1)


def test_the_flat_masks_that_are_refused_fail_in_torchopt() -> None:
    """The refusal's reason: when this fails, they can be allowed."""
    d = nn.Linear(4, 1)
    parameters = tuple(d.parameters())
    impl = torchopt.adamw(S, mask=[True, False])
    state = impl.init(parameters)
    gradients = tuple(torch.ones_like(p) for p in parameters)
    with pytest.raises(AttributeError, match="MaskedNode"):
        impl.update(gradients, state, params=parameters, inplace=False)


def kept_in_a_closure() -> GradientTransformation:
    buffer: Any = None

    def update(updates: Any, state: Any, **_: Any) -> Any:
        nonlocal buffer
        last = buffer or [0.0] * len(updates)
        buffer = tuple(0.9 * b + g for b, g in zip(last, updates, strict=True))
        return tuple(-0.1 * b for b in buffer), state

    return GradientTransformation(lambda _: (), update)


def kept_in_an_object() -> GradientTransformation:
    class Momentum:
        def __init__(self) -> None:
            self.step, self.buffer = 0, dict[int, Any]()

        def update(self, updates: Any, state: Any, **_: Any) -> Any:
            self.step += 1
            for number, g in enumerate(updates):
                self.buffer[number] = 0.9 * self.buffer.get(number, 0.0) + g / self.step
            return tuple(-0.1 * b for b in self.buffer.values()), state

    return GradientTransformation(lambda _: (), Momentum().update)


@pytest.mark.parametrize(
    ("transformation", "name"), [(kept_in_a_closure, "buffer"), (kept_in_an_object, "step")]
)
def test_state_that_a_transformation_keeps_for_itself_is_refused(
    transformation: Callable[[], GradientTransformation], name: str
) -> None:
    d, impl = tanh_net(), transformation()
    before = snapshot(d, impl.update)
    message = rf"^optimizer: .*update keeps state in '{name}', outside.*Put it into .* state"
    for optimizer in (impl, torchopt.Optimizer(d.parameters(), impl)):
        with pytest.raises(ValueError, match=message):
            UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
    assert not changes(before, d, impl.update)


def test_an_in_place_root_in_a_transformation_is_in_place() -> None:
    def update(updates: Any, state: Any, **_: Any) -> Any:
        def step(g: Tensor) -> Tensor:
            v = g * g + 1e-4
            v.sqrt_()
            return -0.1 * g / v

        return tree_map(step, updates), state

    d, real, fake = tanh_net(), randn(5, 3), randn(5, 3)
    ahead = UnrolledGeneratorLoss(
        d, GradientTransformation(lambda _: (), update), unroll_steps=1
    ).unroll(fake, real)
    theta = list(d.parameters())
    value = unroll.Minimax().discriminator_loss(d, fake, real)
    updates, _ = update(torch.autograd.grad(value, theta), ())
    for p, u, q in zip(theta, updates, ahead.parameters.values(), strict=True):
        torch.testing.assert_close(q, p + u, rtol=1e-12, atol=0)


def test_a_root_written_as_a_power_has_a_finite_slope() -> None:
    def update(updates: Any, state: Any, **_: Any) -> Any:
        return tree_map(lambda g: -0.1 * g / ((g * g) ** 0.5 + 1e-8), updates), state

    d = tanh_net()
    fake = fakes()
    impl = GradientTransformation(lambda _: (), update)
    loss = UnrolledGeneratorLoss(
        d, impl, unroll.Wasserstein(), unroll_steps=1
    )  # the output bias has no gradient
    loss(fake, randn(5, 3)).backward()
    assert fake.grad is not None
    assert fake.grad.isfinite().all()


def test_a_where_of_ones_own_beside_adagrad() -> None:
    def update(updates: Any, state: Any, **_: Any) -> Any:
        return tree_map(lambda g: g * (len(torch.where(g > 0)) > 0), updates), state

    d = tanh_net()
    impl = torchopt.chain(GradientTransformation(lambda _: (), update), torchopt.adagrad(0.1))
    assert unroll.check_gradients(
        UnrolledGeneratorLoss(d, impl, unroll_steps=2), fakes(), randn(5, 3)
    ).ok


def test_a_detaching_clip_in_a_partial_is_refused() -> None:
    d, clip = tanh_net(), torchopt.clip_grad_norm(1.0)
    hidden = GradientTransformation(clip.init, partial(clip.update))
    with pytest.raises(ValueError, match=r"torchopt\.clip_grad_norm detaches"):
        UnrolledGeneratorLoss(d, torchopt.chain(hidden, torchopt.sgd(0.1)), unroll_steps=1)
