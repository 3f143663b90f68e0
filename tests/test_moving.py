"""Which parameters move, and what a loop does besides the optimizer's step."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

import unroll
from tests.players import assert_live, fakes, tanh_net
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


def test_a_call_of_the_ordinary_loss_sees_what_requires_a_gradient() -> None:
    d = net()
    d[0].requires_grad_(False)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=0)
    d.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"^discriminator: '0.bias', '0.weight' were frozen or un"):
        loss(randn(5, 3).requires_grad_(), randn(5, 3))
    d.requires_grad_(False)
    loss.unroll_steps = 2
    assert moved(loss) == EVERYTHING


def test_where_nothing_ever_required_a_gradient_all_move() -> None:
    d = net().requires_grad_(False)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)
    assert moved(loss) == EVERYTHING


def test_where_nothing_was_seen_free_those_move_that_the_optimizer_has_stepped() -> None:
    d = net().requires_grad_(False)  # as in StyleGAN's loop, with Projected GAN's backbone
    optimizer = torch.optim.Adam(d.parameters(), 0.1)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    assert moved(loss) == EVERYTHING  # there is nothing to tell
    d[2].requires_grad_(True)
    (d(randn(5, 3)) ** 2).mean().backward()
    d.requires_grad_(False)
    optimizer.step()
    assert moved(loss) == {"2.weight", "2.bias"}


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


def test_a_replaced_step_of_torchopt_is_warned_of() -> None:
    d = net()
    optimizer = torchopt.SGD(d.parameters(), 0.1)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=1)
    optimizer.step = lambda _closure=None: None  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="its step was replaced by a function"):
        moved(loss)


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


def test_parameters_that_d_gains_move() -> None:
    d = tanh_net()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
    d.append(nn.Linear(1, 1).to(DEVICE).double())
    optimizer.add_param_group({"params": d[3].parameters()})
    assert_live(loss)


@pytest.mark.parametrize("rename", [
    lambda d: prune.l1_unstructured(d[0], "weight", 0.3),
    lambda d: orthogonal(d[0], orthogonal_map="cayley", use_trivialization=False),
], ids=["pruned", "orthogonal"])  # fmt: skip
def test_parameters_that_get_another_name_move(rename: Callable[[nn.Module], object]) -> None:
    d = tanh_net()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    rename(d)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": list(d.parameters())})
    assert_live(loss)


@pytest.mark.filterwarnings("ignore:optimizer. holds no")
def test_an_optimizer_of_frozen_parameters_alone_moves_them() -> None:
    d = tanh_net()
    d[2].requires_grad_(False)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d[2].parameters(), lr=0.1), unroll_steps=1)
    ahead = loss.unroll(randn(5, 3), randn(5, 3))
    moved = {n for n, p in d.named_parameters() if not torch.equal(p, ahead.parameters[n])}
    assert moved == {"2.weight", "2.bias"}


def test_a_frozen_part_stays_where_it_is_in_the_self_check_too() -> None:
    d = tanh_net()
    d[0].requires_grad_(False)
    loss = UnrolledGeneratorLoss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2)
    ahead = loss.unroll(randn(5, 3), randn(5, 3))
    assert torch.equal(ahead.parameters["0.weight"], d.get_parameter("0.weight"))
    assert not torch.equal(ahead.parameters["2.weight"], d.get_parameter("2.weight"))
    assert unroll.check_gradients(loss, fakes(), randn(5, 3)).ok


def test_parameters_that_share_memory_are_refused_and_neighbours_are_not() -> None:
    d = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)}).to(DEVICE)
    one, two = d.get_parameter("one.weight"), d.get_parameter("two.weight")
    two.data = one.data.t()
    with pytest.raises(ValueError, match=r"'one\.weight' and 'two\.weight' share memory.*Make"):
        UnrolledGeneratorLoss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=1)
    whole = torch.randn(3, 6, device=DEVICE)
    one.data, two.data = whole[:, :3], whole[:, 3:]
    UnrolledGeneratorLoss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=1)


def test_attributes_of_a_parameter_are_those_of_theta() -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            vars(self.layer.weight)["gain"] = 2.0
            self.to(DEVICE, torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            gain: float = vars(self.layer.weight)["gain"]
            output: Tensor = gain * self.layer(x)
            return output

    d = Gained()
    loss = UnrolledGeneratorLoss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2)
    assert_live(loss)
    assert unroll.check_gradients(loss, fakes(), randn(5, 3)).ok


def test_a_multi_grad_hook_is_named() -> None:
    d = tanh_net()
    torch.autograd.graph.register_multi_grad_hook(tuple(d.parameters()), lambda _: None)
    with pytest.raises(TypeError, match=r"register_multi_grad_hook.*Use parameter\.register_hook"):
        UnrolledGeneratorLoss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=1)(
            fakes(), randn(5, 3)
        )


def test_a_frozen_discriminator_with_an_integer_parameter() -> None:
    d = tanh_net()
    d.register_parameter("level", nn.Parameter(torch.zeros(2, dtype=torch.int8), False))
    d.requires_grad_(False)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=1)
    assert loss(fakes(), randn(5, 3)).isfinite()


def test_step_hooks_are_warned_of() -> None:
    d = tanh_net()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.3)
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"optimizer: has step hooks.*project="):
        UnrolledGeneratorLoss(d, optimizer, unroll_steps=1)


def test_gradient_hooks_of_parameters_run_in_the_look_ahead() -> None:
    d, real, fake = tanh_net(), randn(5, 3), randn(5, 3)
    for p in d.parameters():
        p.register_hook(lambda g: g.clamp(-0.01, 0.01))
    optimizer = torch.optim.SGD(d.parameters(), lr=0.3)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    ahead = loss.unroll(fake, real).parameters
    for _ in range(2):
        optimizer.zero_grad()
        unroll.Minimax().discriminator_loss(d, fake, real).backward()
        optimizer.step()
    for name, p in d.named_parameters():
        torch.testing.assert_close(ahead[name], p.detach(), rtol=1e-12, atol=0)


def test_the_callers_saved_tensor_hooks_are_welcome() -> None:
    d, real, fake = tanh_net(), randn(5, 3), fakes()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2)
    (plain,) = torch.autograd.grad(loss(fake, real), fake)
    with torch.autograd.graph.save_on_cpu():
        (saved,) = torch.autograd.grad(loss(fake, real), fake)
    whole = torch.utils.checkpoint.checkpoint(partial(loss, real=real), fake, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(whole, fake)
    assert torch.equal(plain, saved)
    assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("where", ["a buffer", "an attribute", "a list"])
def test_what_d_keeps_of_a_parameters_memory_is_refused(where: str) -> None:
    d: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).to(DEVICE)
    shared = d[0].weight.detach()[1:]
    if where == "a buffer":
        d[1].register_buffer("kept", shared)
    else:
        vars(d[1]).update(kept=[shared] if where == "a list" else shared)
    with pytest.raises(
        ValueError, match=r"'1\.kept' shares memory with the parameter '0\.weight'.*keep a clone"
    ):
        UnrolledGeneratorLoss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=1)
    d[0].requires_grad_(False)  # a step does not move it
    UnrolledGeneratorLoss(d, torch.optim.Adam(d[1].parameters(), lr=0.05), unroll_steps=1)


def test_a_weight_that_a_spectral_norm_makes_anew_shares_memory_with_nothing() -> None:
    d: Any = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 1)).to(DEVICE)
    assert d[0].weight.data_ptr() == d[0].weight_orig.data_ptr()
    UnrolledGeneratorLoss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=1)
