"""Several optimizers for one D, among them Muon, which takes matrices alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import unroll
from tests import oracles
from tests.games import Game
from tests.own_rules import Lion, matrices, others, with_muon
from tests.players import LR, batches, deep, small, train
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from tests.test_compile import as_it_is
from tests.test_live import TOLERANCE, LightningOptimizer, assert_close, looked_ahead
from unroll._modes import backend
from unroll._optimizers import group_rules, inner_optimizer

Muon: Any = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(Muon is None, reason="torch.optim.Muon came with torch 2.9")

LISTS: dict[str, Callable[[nn.Module], list[Any]]] = {
    "SGD, Adam": lambda d: [
        torch.optim.SGD(others(d), lr=LR, momentum=0.9),
        torch.optim.Adam(matrices(d), lr=LR, weight_decay=0.1),
    ],
    "torchopt, RMSprop": lambda d: [
        torchopt.Adam(matrices(d), lr=LR),
        torch.optim.RMSprop(others(d), lr=LR / 10),
    ],
    "Lion, Adafactor": lambda d: [Lion(others(d)), torch.optim.Adafactor(matrices(d), lr=LR)],
    "one alone": lambda d: [torch.optim.NAdam(d.parameters(), lr=LR)],
}


def wide(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a D with matrices of every form."""
    layers = (nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 3))
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(3, 1)).to(DEVICE, dtype)


def parameters_of(d: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in d.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"average": True}], ids=str)
@pytest.mark.parametrize("name", LISTS)
def test_k_steps_are_real_steps_of_each(name: str, options: dict[str, Any]) -> None:
    (pair,) = batches(1)
    torch.manual_seed(0)
    d = small()
    optimizers = LISTS[name](d)
    train(d, optimizers, batches(2, seed=1))
    loss = looked_ahead(d, optimizers, 3, **options)
    fake = pair[0].clone().requires_grad_()
    before = snapshot(d, optimizers)
    ahead, detached = loss.unroll(fake, pair[1]), loss.unroll(*pair)
    assert isinstance(ahead.optimizer_state, list)
    assert not changes(before, d, optimizers)
    train(d, optimizers, [pair] * 3)
    for found in (ahead, detached):
        assert_close(found.parameters, parameters_of(d), 1e-12)
        assert_close(found.buffers, dict(d.named_buffers()), 1e-12)
    optimizer = optimizers[0]
    if name == "SGD, Adam":
        for n, p in d.named_parameters():
            if p in optimizer.state:
                got = ahead.optimizer_state[0][n]["momentum_buffer"]
                torch.testing.assert_close(
                    got, optimizer.state[p]["momentum_buffer"], rtol=1e-11, atol=1e-15
                )


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "average"])
@pytest.mark.parametrize("name", LISTS)
def test_central_differences(name: str, mode: str) -> None:
    assert_right(LISTS[name], **({} if mode == "plain" else {mode: True}))


def assert_right(build: Callable[[nn.Module], Any], **options: Any) -> None:
    game = Game(6)
    optimizers = build(game.discriminator)
    for k in range(2):
        train(game.discriminator, optimizers, [(game.fake(game.theta, k), game.real[k])])
    loss = looked_ahead(game.discriminator, optimizers, 3, **options)

    def surrogate(theta: Tensor) -> Tensor:
        value: Tensor = loss(game.fake(theta), game.real[0])
        return value

    theta = game.theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(theta), theta)
    assert oracles.relative_error(surrogate, game.theta, gradient) <= 1e-6


@pytest.mark.parametrize("name", LISTS)
def test_check_gradients(name: str) -> None:
    torch.manual_seed(0)
    d = deep()
    optimizers = LISTS[name](d)
    train(d, optimizers, batches(2, seed=1))
    report = unroll.check_gradients(looked_ahead(d, optimizers, 2), *batches(1)[0])
    assert report.ok, report


def test_a_projection_comes_after_all_of_them() -> None:
    (pair,) = batches(1)
    d = deep()
    optimizers = LISTS["SGD, Adam"](d)

    def clipped(parameters: Any) -> Any:
        return {n: p.clamp(-0.3, 0.3) for n, p in parameters.items()}

    ahead = looked_ahead(d, optimizers, 3, project=clipped).unroll(*pair)
    for _ in range(3):
        train(d, optimizers, [pair])
        for p in d.parameters():
            p.data.clamp_(-0.3, 0.3)
    assert_close(ahead.parameters, parameters_of(d), 1e-12)


@pytest.mark.parametrize("name", ["SGD, Adam", "Lion, Adafactor"])
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "generated", as_it_is)  # generating code takes a minute
    (pair,) = batches(1)
    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        d = deep(layers=4)
        optimizers = LISTS[name](d)
        train(d, optimizers, batches(2, seed=1))
        fake = pair[0].clone().requires_grad_()
        loss = looked_ahead(d, optimizers, 3, compile=compile)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results.append(torch.autograd.grad(loss(fake, pair[1]), fake)[0])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-14)


def test_all_of_torch_is_traced_and_anything_else_is_not() -> None:
    d = deep()
    parameters = dict(d.named_parameters())
    traceable = {n: inner_optimizer(build(d), parameters).traceable for n, build in LISTS.items()}
    assert {n for n, value in traceable.items() if value} == {"SGD, Adam"}  # NAdam branches


def test_the_list_is_read_at_every_call_and_wrappers_may_stay_on() -> None:
    (pair,) = batches(1)
    d = deep()
    optimizers = LISTS["SGD, Adam"](d)
    loss = looked_ahead(d, [LightningOptimizer(one) for one in optimizers], 2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizers[1], 0.1)
    for _ in range(2):
        ahead = loss.unroll(*pair)
        train(d, optimizers, [pair] * 2)
        assert_close(ahead.parameters, parameters_of(d), 1e-12)
        scheduler.step()


def test_two_discriminators_under_one_optimizer() -> None:
    """D is then a module that holds both, and the objective calls each by its name."""

    class Both(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self["global"](x), self["local"](x[:, 1:3])], dim=1)

    (pair,) = batches(1)
    torch.manual_seed(0)
    d = Both({"global": nn.Linear(4, 1), "local": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))})
    d.to(DEVICE, torch.float64)
    optimizer = torch.optim.Adam([*d["global"].parameters(), *d["local"].parameters()], lr=LR)
    train(d, optimizer, batches(2, seed=1))
    ahead = looked_ahead(d, optimizer, 3).unroll(*pair)
    train(d, optimizer, [pair] * 3)
    assert_close(ahead.parameters, parameters_of(d), 1e-12)


def _held_twice(d: nn.Module) -> list[Any]:
    return [torch.optim.Adam(d.parameters()), torch.optim.SGD(others(d), 0.1)]


def _elsewhere(d: nn.Module) -> list[Any]:
    return [torch.optim.Adam(d.parameters()), torch.optim.SGD([nn.Parameter(randn(3))], 0.1)]


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "held twice": (
        _held_twice,
        ValueError,
        r"a list must hold different parameters of the discriminator; '0\.bias' has several\. Giv",
    ),
    "functional": (
        lambda d: [torchopt.FuncOptimizer(torchopt.adam(0.1)), torch.optim.SGD(others(d), 0.1)],
        ValueError,
        r"different parameters of the discriminator; '0\.bias' has several",
    ),
    "empty": (lambda _: [], ValueError, r"must hold optimizers .*at least one; got \[\]\. Put a "),
    "bare": (
        lambda d: [torch.optim.SGD(others(d), 0.1), torchopt.adam(0.1)],
        ValueError,
        r"got \['SGD', 'GradientTransformation'\]\. Put .*torchopt\.Optimizer\(parameters, transf",
    ),
    "none of D": (_elsewhere, ValueError, "must hold parameters of the discriminator; it holds no"),
    "no optimizer": (lambda _: ["Adam"], TypeError, r"or a list of optimizers; got str\. Pass the"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    d = deep()
    build, error, message = REFUSED[name]
    with pytest.raises(error, match=rf"^optimizer: .*{message}"):
        looked_ahead(d, build(d), 1)


def test_a_list_brings_its_own_state() -> None:
    d = deep()
    loss = looked_ahead(d, LISTS["SGD, Adam"](d), 1)
    with pytest.raises(ValueError, match=r"optimizer_state: goes only with a bare .* list brings"):
        loss(batches(1)[0][0].requires_grad_(), batches(1)[0][1], optimizer_state=())


def test_each_is_looked_at_for_what_the_look_ahead_leaves_out() -> None:
    def hooked(optimizers: Any) -> None:
        optimizers[1].register_step_post_hook(lambda *_: None)

    def replaced(optimizers: Any) -> None:
        plain = optimizers[1].step
        optimizers[1].step = lambda: plain()

    for change, text in ((hooked, "has step hooks"), (replaced, "its step was replaced")):
        d = deep()
        optimizers = LISTS["SGD, Adam"](d)
        change(optimizers)
        with pytest.warns(UserWarning, match=rf"^optimizer: {text}"):
            looked_ahead(d, optimizers, 1)
    d = deep()
    optimizers = [torch.optim.SGD([d[0].weight], 0.1), torch.optim.SGD([d[0].bias], 0.1)]  # type: ignore[index]
    with pytest.warns(UserWarning, match=r"^optimizer: holds no '1\.bias', '1\.weight'"):
        looked_ahead(d, optimizers, 1)


MUON: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no Nesterov": {"nesterov": False, "momentum": 0.5, "weight_decay": 0.0},
    "as AdamW": {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    "original": {"adjust_lr_fn": "original", "ns_coefficients": (1.5, -0.5, 0.0), "eps": 0.1},
}
if Muon is not None and "spectral_unclamped" in str(Muon.__doc__):  # from torch 2.14 on
    MUON["unclamped"] = {"adjust_lr_fn": "spectral_unclamped"}


@needs_muon
@pytest.mark.parametrize("warm", [0, 20])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MUON)
def test_muon_takes_its_real_steps(name: str, dtype: torch.dtype, warm: int) -> None:
    """Rounded to bfloat16 as torch does it."""
    (pair,) = batches(1, dtype)
    torch.manual_seed(0)
    d = wide(dtype)
    optimizers = with_muon(d, **MUON[name])
    train(d, optimizers, batches(warm, dtype, seed=1))
    loss = looked_ahead(d, optimizers, 3)
    ahead = loss.unroll(pair[0].clone().requires_grad_(), pair[1])
    train(d, optimizers, [pair] * 3)
    assert_close(ahead.parameters, parameters_of(d), TOLERANCE[dtype])


@needs_muon
def test_muon_with_a_tensor_for_lr() -> None:
    (pair,) = batches(1)
    d = wide()
    optimizers = with_muon(d)
    optimizers[1].param_groups[0]["lr"] = torch.tensor([LR], dtype=torch.float64)
    ahead = looked_ahead(d, optimizers, 3).unroll(*pair)
    train(d, optimizers, [pair] * 3)
    assert_close(ahead.parameters, parameters_of(d), 1e-12)


@needs_muon
@pytest.mark.parametrize("mode", ["plain", "checkpoint", "average"])
@pytest.mark.parametrize("name", MUON)
def test_muons_derivative_by_differences_of_its_float64_form(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_rules, "MUON_DTYPE", torch.float64)
    options = {} if mode == "plain" else {mode: True}
    assert_right(lambda d: with_muon(d, **MUON[name]), **options)


def exact_muon(g: Tensor, buffer: Tensor, h: dict[str, Any]) -> Tensor:
    """Return Muon's step by the singular values, on which Newton-Schulz is a polynomial."""
    a, b, c = h["ns_coefficients"]
    buffer = h["momentum"] * buffer + (1 - h["momentum"]) * g
    u, s, v = torch.linalg.svd(
        (1 - h["momentum"]) * g + h["momentum"] * buffer, full_matrices=False
    )
    s = s / s.square().sum().sqrt()
    for _ in range(h["ns_steps"]):
        s = a * s + b * s**3 + c * s**5
    step: Tensor = u @ torch.diag(s) @ v
    return step


@needs_muon
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (3, 3)], ids=str)
def test_muons_derivative_is_that_without_rounding(shape: tuple[int, int]) -> None:
    p, buffer, seed = randn(3, *shape)
    g = randn(*shape).requires_grad_()
    group = {k: v for k, v in Muon([nn.Parameter(p)]).param_groups[0].items() if k != "params"}
    rule = group_rules.GROUP_RULES[Muon]
    (moved,), _, _ = rule([p], [g], [{"momentum_buffer": buffer}], group)
    ratio = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
    wanted = p * (1 - group["lr"] * group["weight_decay"]) - ratio * exact_muon(g, buffer, group)
    off = (moved - wanted).norm() / ratio
    assert 1e-4 < off < 0.1  # the value is that of bfloat16
    (found,), (exact,) = (torch.autograd.grad(x, g, seed) for x in (moved, wanted))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-13)


@needs_muon
def test_muon_of_a_matrix_without_gradient_has_a_finite_derivative() -> None:
    torch.manual_seed(0)
    d = wide()
    with torch.no_grad():
        d[2].weight.zero_()  # type: ignore[index]
    (pair,) = batches(1)
    fake = pair[0].clone().requires_grad_()
    loss = looked_ahead(d, with_muon(d), 3)
    (gradient,) = torch.autograd.grad(loss(fake, pair[1]), fake)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
