"""Registered rules: K real steps, central differences, every mode, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unroll
from tests import oracles
from tests.games import Game
from tests.own_rules import OWN, RULES, Lion, Own, Prodigy, ScheduleFreeSGD, lion
from tests.players import batches, deep, train
from tests.snapshot import changes, snapshot
from tests.test_compile import as_it_is
from tests.test_live import TwoHeads, assert_close, looked_ahead
from unroll._modes import backend
from unroll._optimizers.group_rules import GROUP_RULES


@pytest.fixture(autouse=True)
def _rules_are_put_back() -> Iterator[None]:
    before = dict(GROUP_RULES)
    yield
    GROUP_RULES.clear()
    GROUP_RULES.update(before)


def stepped(d: nn.Module, optimizer: Any, k: int) -> dict[str, Tensor]:
    """Take ``k`` real steps on the batch of the tests and return D's parameters."""
    train(d, optimizer, batches(1) * k)
    return {n: p.detach() for n, p in d.named_parameters()}


def prepared(name: str, warm: int, layers: int = 16) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    d = deep(layers=layers)
    optimizer = OWN[name](d)
    train(d, optimizer, batches(warm, seed=1))
    return d, optimizer


@pytest.mark.parametrize("warm", [0, 1, 20])
@pytest.mark.parametrize("name", OWN)
def test_k_steps_are_real_steps(name: str, warm: int) -> None:
    d, optimizer = prepared(name, warm)
    before = {n: p.detach().clone() for n, p in d.named_parameters()}
    (pair,) = batches(1)
    ahead = looked_ahead(d, optimizer, 3).unroll(*pair)
    wanted = stepped(d, optimizer, 3)
    assert_close(ahead.parameters, wanted, 1e-12)
    assert max((p - before[n]).norm() / p.norm() for n, p in wanted.items()) > 1e-4
    for n, p in d.named_parameters():
        assert ahead.optimizer_state[n].keys() == optimizer.state[p].keys()
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(ahead.optimizer_state[n][key], value, rtol=1e-11, atol=1e-15)


def gradient_and_surrogate(
    optimizer_of: Callable[[nn.Module], Any], warm: int, **options: Any
) -> tuple[Game, Tensor, Callable[[Tensor], Tensor]]:
    game = Game(6)
    optimizer = optimizer_of(game.discriminator)
    game.warmed(optimizer, warm)
    settings = {"unroll_steps": 3, **options}
    loss = unroll.UnrolledGeneratorLoss(game.discriminator, optimizer, **settings)

    def surrogate(theta: Tensor) -> Tensor:
        value: Tensor = loss(game.fake(theta), game.real[0])
        return value

    theta = game.theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(theta), theta)
    return game, gradient, surrogate


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "average", "stop_gradient"])
@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", OWN)
def test_central_differences(name: str, warm: int, mode: str) -> None:
    options = {} if mode == "plain" else {mode: True}
    game, gradient, surrogate = gradient_and_surrogate(OWN[name], warm, **options)
    if mode != "stop_gradient":
        assert oracles.relative_error(surrogate, game.theta, gradient) <= 1e-6
        return
    _, full, _ = gradient_and_surrogate(OWN[name], warm)
    second_term = name != "Lion"  # whose steps are signs, up to the momentum that has no effect
    assert torch.allclose(gradient, full) is not second_term


@pytest.mark.parametrize("name", OWN)
def test_check_gradients(name: str) -> None:
    d, optimizer = prepared(name, 2)
    report = unroll.check_gradients(looked_ahead(d, optimizer, 2), *batches(1)[0])
    assert report.relative_error < 1e-5


def test_what_prodigy_estimates_is_differentiated() -> None:
    """A rule that takes d for a number loses a part of the gradient, which the check sees."""

    def detached(parameters: Any, gradients: Any, states: Any, group: Any) -> Any:
        moved, new, group = RULES[Prodigy](parameters, gradients, states, group)
        return moved, new, {**group, "d": group["d"].detach()}

    d, optimizer = prepared("Prodigy", 2, layers=4)
    unroll.register_rule(Prodigy, detached)
    loss = looked_ahead(d, optimizer, 3)
    assert_close(
        loss.unroll(*batches(1)[0]).parameters, stepped(*copy.deepcopy((d, optimizer)), 3), 1e-12
    )
    report = unroll.check_gradients(loss, *batches(1)[0])
    assert not report.ok


@pytest.mark.parametrize("name", OWN)
def test_param_groups_and_schedulers_are_live(name: str) -> None:
    (pair,) = batches(1)
    torch.manual_seed(0)
    d = deep()
    p = list(d.parameters())
    optimizer = type(OWN[name](d))([{"params": p[9:]}, {"params": p[:9], "lr": 1e-4}])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loss = looked_ahead(d, optimizer, 2)
    for _ in range(3):
        ahead = loss.unroll(*pair)
        assert_close(ahead.parameters, stepped(d, optimizer, 2), 1e-12)
        scheduler.step()


@pytest.mark.parametrize("heads", [(0, 1, 0), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_parameters_without_a_gradient_are_skipped(name: str, heads: tuple[int, ...]) -> None:
    """One param group per layer: that of a head without gradients counts the step all the same."""
    d = TwoHeads()
    groups = [{"params": list(m.parameters())} for m in (d.body, d.unused, *d.heads)]
    optimizer = type(OWN[name](d))(groups)
    pairs = [
        ({"x": fake, "head": head}, {"x": real, "head": head})
        for head, (fake, real) in zip(heads, batches(3), strict=True)
    ]
    train(d, optimizer, pairs[:1])
    ahead = looked_ahead(d, optimizer, 3).unroll(*pairs[0], minibatches=pairs)
    train(d, optimizer, pairs)
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_setting_that_requires_a_gradient_gets_it(checkpoint: bool) -> None:
    (pair,) = batches(1)
    d, optimizer = prepared("ScheduleFreeSGD", 2)
    lr = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    optimizer.param_groups[0]["lr"] = lr
    loss = looked_ahead(d, optimizer, 3, checkpoint=checkpoint)
    fake = pair[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(fake, pair[1]), lr)

    def value(shift: float) -> float:
        with torch.no_grad():
            optimizer.param_groups[0]["lr"] = lr + shift
            return float(loss(*pair))

    difference = oracles.central_difference(value, 1e-3)
    assert abs(gradient.item() - difference) <= 1e-7 * abs(difference)


@pytest.mark.parametrize("name", OWN)
def test_nothing_of_the_users_changes(name: str) -> None:
    (pair,) = batches(1)
    d, optimizer = prepared(name, 2)
    before = snapshot(d, optimizer)
    looked_ahead(d, optimizer, 3)(pair[0].clone().requires_grad_(), pair[1]).backward()
    assert not changes(before, d, optimizer)


def test_dead_units_give_no_nan() -> None:
    """The root of a second moment that is zero has an infinite slope: it is taken as 0."""
    torch.manual_seed(0)
    dead = nn.Linear(4, 4)
    with torch.no_grad():
        dead.bias.fill_(-1e3)
    d = nn.Sequential(dead, nn.ReLU(), nn.Linear(4, 1)).double()
    (pair,) = batches(1)
    fake = pair[0].clone().requires_grad_()
    loss = looked_ahead(d, OWN["Prodigy"](d), 3)
    (gradient,) = torch.autograd.grad(loss(fake, pair[1]), fake)
    assert gradient.isfinite().all()


def test_compiled_gradients_eager_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "generated", as_it_is)  # generating code takes minutes
    (pair,) = batches(1)
    results = []
    for compile in (False, True):
        d, optimizer = prepared("ScheduleFreeSGD", 2, layers=4)
        fake = pair[0].clone().requires_grad_()
        loss = looked_ahead(d, optimizer, 3, compile=compile)
        results.append(torch.autograd.grad(loss(fake, pair[1]), fake)[0])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


def test_subclasses() -> None:
    class Renamed(Lion):
        pass

    class Stepping(Lion):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)

    d = deep()
    looked_ahead(d, Renamed(d.parameters()), 1)
    message = r"Stepping is known\. Use one of .*Adam.*register_rule\(Stepping, rule\)"
    with pytest.raises(TypeError, match=message):
        looked_ahead(d, Stepping(d.parameters()), 1)
    unroll.register_rule(Stepping, lion)
    looked_ahead(d, Stepping(d.parameters()), 1)


def still(parameters: Any, _: Any, states: Any, group: Any) -> Any:
    return [p * 1 for p in parameters], states, group


def test_registering_again_replaces_also_what_is_built_in() -> None:
    (pair,) = batches(1)
    d = deep()
    before = {n: p.detach().clone() for n, p in d.named_parameters()}
    adam = torch.optim.Adam(d.parameters())
    unroll.register_rule(torch.optim.Adam, lion)
    unroll.register_rule(torch.optim.Adam, still)
    assert_close(looked_ahead(d, adam, 2).unroll(*pair).parameters, before, 0.0)


@pytest.mark.parametrize("cls", [nn.Linear, Lion.step, "Lion", unroll.UnrolledGeneratorLoss])
def test_a_class_that_is_no_optimizer_is_refused(cls: Any) -> None:
    message = r"optimizer_class: must be a subclass of torch\.optim\.Optimizer; got .*Pass the cl"
    with pytest.raises(TypeError, match=message):
        unroll.register_rule(cls, lion)


def test_a_rule_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"rule: must be a function .*; got 'lion'\. Pass the fun"):
        unroll.register_rule(Lion, "lion")  # type: ignore[arg-type]


def in_place(parameters: Any, gradients: Any, states: Any, group: Any) -> Any:
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p.sub_(group["lr"] * g)
    return parameters, states, group


def in_place_state(parameters: Any, gradients: Any, states: Any, group: Any) -> Any:
    moved, new, group = lion(parameters, gradients, states, group)
    states[0]["exp_avg"].detach().mul_(0.5)
    return moved, new, group


def no_grad(parameters: Any, gradients: Any, states: Any, group: Any) -> Any:
    with torch.no_grad():
        return lion(parameters, gradients, states, group)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a tensor": (lambda p, _g, _s, _h: p[0], r"return \(new_parameters, .*; got Tensor\. Return"),
    "a pair": (lambda p, _g, s, _h: (p, s), r"return \(new_para.*; got tuple, list, list\. Retu"),
    "the group first": (lambda p, _g, s, h: (h, p, s), r"got tuple, dict, list, list\. Return a"),
    "a generator": (
        lambda p, _g, s, h: ((q for q in p), s, h),
        r"got tuple, generator, list, dict\. Return a list",
    ),
    "too few": (
        lambda p, _g, s, h: (p[1:], s, h),
        r"26 parameters that it was given; got 25 and 26\. Keep",
    ),
    "another shape": (
        lambda p, _g, s, h: ([q[None] for q in p], s, h),
        r"keep the shape and type of parameters; '0\.weight' came as \(4, 4\) torch\.float64 and "
        r"left as \(1, 4, 4\) torch\.float64",
    ),
    "another type": (lambda p, _g, s, h: ([q.float() for q in p], s, h), r"left as .*float32"),
    "numbers": (lambda p, _g, s, h: ([1.0 for _ in p], s, h), r"left as 1\.0\. Reduce"),
    "a part of the group": (
        lambda p, _g, s, h: (p, s, {"k": h["lr"]}),
        r"a group without \['betas', 'lr', 'weight_decay'\]\. Return \{\*\*group",
    ),
    "tensors for states": (
        lambda p, _g, _s, h: (p, p, h),
        r"the group as dicts.*states of \['Tensor'\]",
    ),
    "in place": (in_place, r"not write in place into what it is given; it did\. Write p = p - "),
    "in place, with a graph": (
        lambda p, _g, s, h: ([q.mul_(2.0) for q in p], s, h),
        "not write in place into what it is given",
    ),
    "in place, a state": (in_place_state, "not write in place into what it is given"),
    "without a graph": (no_grad, r"be differentiable; '0\.weight' left without a graph\. Compute"),
    "detached": (
        lambda p, _g, s, h: ([q.detach() * 2 for q in p], s, h),
        r"be differentiable; '0\.weight' left without a graph",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_rule_must_not_do(name: str) -> None:
    rule, message = REFUSED[name]
    (pair,) = batches(1)
    d, optimizer = prepared("Lion", 1)
    before = snapshot(d, optimizer)
    unroll.register_rule(Lion, rule)
    loss = looked_ahead(d, optimizer, 2)
    with pytest.raises(ValueError, match=rf"^rule of Lion: must .*{message}"):
        loss(pair[0].clone().requires_grad_(), pair[1])
    assert not changes(before, d, optimizer)


def test_what_a_rule_raises_comes_through() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("mine")

    d, optimizer = prepared("Lion", 0)
    unroll.register_rule(Lion, broken)
    with pytest.raises(RuntimeError, match=r"^mine$"):
        looked_ahead(d, optimizer, 1).unroll(*batches(1)[0])


def test_new_entries_may_be_put_into_the_dicts_that_a_rule_is_given() -> None:
    def counting(parameters: Any, gradients: Any, states: Any, group: Any) -> Any:
        moved, new, _ = lion(parameters, gradients, states, group)
        group["k"] = group.get("k", 0) + 1
        states[0]["seen"] = True
        return moved, new, group

    d, optimizer = prepared("Lion", 1)
    unroll.register_rule(Lion, counting)
    ahead = looked_ahead(d, optimizer, 2).unroll(*batches(1)[0])
    assert "k" not in optimizer.param_groups[0]
    assert_close(ahead.parameters, stepped(d, optimizer, 2), 1e-12)


def test_every_optimizer_of_the_tests_is_checked() -> None:
    assert {type(build(deep())) for build in OWN.values()} == RULES.keys()
    assert set(Own.__subclasses__()) >= {Lion, ScheduleFreeSGD, Prodigy}
