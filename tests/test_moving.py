"""Which parameters move, and what a loop does besides the optimizer's step."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.settings import DEVICE, randn
from unroll import UnrolledGeneratorLoss


def net() -> nn.Sequential:
    layers = (nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return nn.Sequential(*layers).to(DEVICE, torch.float64)


def moved(loss: UnrolledGeneratorLoss) -> set[str]:
    ahead = loss.unroll(randn(5, 3), randn(5, 3))
    parameters = dict(loss.discriminator.named_parameters())
    return {n for n, p in ahead.parameters.items() if not torch.equal(p, parameters[n])}


EVERYTHING = {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_what_requires_a_gradient_at_the_call_moves() -> None:
    d = net()
    d[0].requires_grad_(False)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)
    assert moved(loss) == {"2.weight", "2.bias"}
    d.requires_grad_(False)  # for G's step alone
    assert moved(loss) == {"2.weight", "2.bias"}
    d.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"^discriminator: '0.bias', '0.weight' were frozen or un"):
        assert moved(loss) == EVERYTHING
    d[2].requires_grad_(False)
    assert moved(loss) == {"0.weight", "0.bias"}  # it was said once
    d.requires_grad_(False)
    assert moved(loss) == {"0.weight", "0.bias"}


def test_where_nothing_ever_required_a_gradient_all_move() -> None:
    d = net().requires_grad_(False)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)
    assert moved(loss) == EVERYTHING


def test_a_part_of_d_that_no_optimizer_holds_is_warned_of() -> None:
    d = net()
    optimizer = torch.optim.AdamW([p for n, p in d.named_parameters() if "bias" in n])
    message = (
        r"^optimizer: holds no '0.weight', '2.weight' of .*stand still.*requires_grad_\(False\)"
    )
    with pytest.warns(UserWarning, match=message):
        loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=1)
    assert moved(loss) == {"0.bias", "2.bias"}
    for name in ("0.weight", "2.weight"):
        d.get_parameter(name).requires_grad_(False)
    UnrolledGeneratorLoss(d, optimizer, unroll_steps=1)


def _clipped(optimizer: Any) -> None:
    plain = optimizer.step

    def step(closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
        return plain(closure)

    optimizer.step = step


def _hooked(optimizer: Any) -> None:
    optimizer.register_step_post_hook(lambda *_: None)


LEFT_OUT: dict[str, tuple[Callable[[Any], object], str]] = {
    "a step that clips": (_clipped, "its step was replaced by a function"),
    "step hooks": (_hooked, "has step hooks"),
    "global hooks": (
        lambda _: register_optimizer_step_pre_hook(lambda *_: None),
        "torch has global step hooks",
    ),
}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_the_look_ahead_leaves_out_is_warned_of_once(name: str, later: bool) -> None:
    """Also where it comes after the loss was made."""
    change, text = LEFT_OUT[name]
    d = net()
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=1) if later else None
    handle: Any = change(optimizer)
    try:
        with pytest.warns(UserWarning, match=rf"^optimizer: {text}.*project=") as caught:
            loss = loss or UnrolledGeneratorLoss(d, optimizer, unroll_steps=1)
            moved(loss)
        assert len(caught) == 1
        moved(loss)
    finally:
        if name == "global hooks":
            handle.remove()


HARMLESS: dict[str, Callable[[Any], object]] = {
    "a scheduler": lambda optimizer: lr_scheduler.StepLR(optimizer, 10),
    "two schedulers": lambda optimizer: [
        lr_scheduler.StepLR(optimizer, 10),
        lr_scheduler.ExponentialLR(optimizer, 0.9),
    ],
    "bound again, as Accelerate leaves it": lambda o: setattr(o, "step", o.step),
    "compiled": lambda o: setattr(o, "step", torch.compile(o.step, backend="eager")),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_leaves_the_step_as_it_is_is_not_warned_of(name: str) -> None:
    d = net()
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    HARMLESS[name](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved(UnrolledGeneratorLoss(d, optimizer, unroll_steps=1))
    torch._dynamo.reset()


class Grouped(torch.optim.SGD):
    """An SGD that leaves some parameters out."""

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        return super()._init_group(*args, **kwargs)


class Renamed(torch.optim.SGD):
    """An SGD by another name."""


def test_a_subclass_that_overrides_a_part_of_the_step_is_refused() -> None:
    d = net()
    with pytest.raises(TypeError, match=r"no differentiable form of tests.test_moving.Grouped"):
        UnrolledGeneratorLoss(d, Grouped(d.parameters(), 0.1), unroll_steps=1)
    assert moved(UnrolledGeneratorLoss(d, Renamed(d.parameters(), 0.1), unroll_steps=1))
