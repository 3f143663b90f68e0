"""``check_step`` on planted faults: every one is found, and the words name the cause."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import unroll
from tests.settings import DEVICE
from tests.test_check_step import OPTIMIZERS, Step, batch, net, plain, trained
from unroll import UnrolledGeneratorLoss as Loss

bce = nn.BCEWithLogitsLoss()
Tweak = Callable[[Tensor, nn.Module, Tensor, Tensor], Tensor]


def terms(d: nn.Module, fake: Tensor, real: Tensor, labels: Any = (1.0, 0.0)) -> Tensor:
    outputs = d(real), d(fake)
    parts = (bce(o, torch.full_like(o, label)) for o, label in zip(outputs, labels, strict=True))
    total: Tensor = sum(parts, torch.zeros((), device=DEVICE))
    return total


def one_sided(d: Any, fake: Tensor, real: Tensor) -> Tensor:
    return terms(d, fake, real, (0.9, 0.0))


def r1(d: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    return slope.square().sum(1).mean()


def looped(
    loss: Loss,
    *,
    value: Callable[[nn.Module, Tensor, Tensor], Tensor] = terms,
    first: Callable[[Loss], object] = lambda _: None,
    clip: Callable[[Loss], object] = lambda _: None,
    last: Callable[[Loss], object] = lambda _: None,
    zero: bool = True,
) -> Step:
    """Return the step of a loop, with something put in."""

    def step(fake: Tensor, real: Tensor) -> None:
        first(loss)
        if zero:
            loss.optimizer.zero_grad()
        value(loss.discriminator, fake, real).backward()
        clip(loss)
        loss.optimizer.step()
        last(loss)

    return step


def clamp(loss: Loss) -> None:
    for p in loss.discriminator.parameters():
        p.data.clamp_(-0.05, 0.05)


def scheduled(loss: Loss) -> None:
    loss.optimizer.param_groups[0]["lr"] *= 0.5


def twice(loss: Loss) -> Step:
    step = plain(loss)

    def both(fake: Tensor, real: Tensor) -> None:
        step(fake, real)
        step(fake, real)

    return both


def every_second(loss: Loss) -> Step:
    count = 0

    def step(fake: Tensor, real: Tensor) -> None:
        nonlocal count
        count += 1
        (loss.discriminator_loss(fake, real) / 2).backward()
        if count % 2 == 0:
            loss.optimizer.step()
            loss.optimizer.zero_grad()

    return step


def with_a_second(loss: Loss) -> Step:
    """A second optimizer that moves what the first holds, too."""
    second = torch.optim.SGD([loss.discriminator.get_parameter("4.bias")], 0.1)
    return looped(loss, last=lambda _: second.step())


def normalised(loss: Loss) -> None:
    with torch.no_grad():
        for p in loss.discriminator.parameters():
            p.div_(p.norm())


def of_state(loss: Loss) -> None:
    for state in loss.optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value) and value.ndim:
                value.mul_(2)


def frozen(loss: Loss) -> None:
    loss.discriminator.get_submodule("0").requires_grad_(False)


# name -> (the step, words); the objective is Criterion(bce)
FAULTS: dict[str, tuple[Callable[[Loss], Step], str]] = {
    "weight": (
        partial(looped, value=lambda *a: terms(*a) / 2),
        r"^D's loss in `step` is 0\.5 times the objective's.*weight=0\.5 to unroll\.Criterion\.$",
    ),
    "clip by norm": (
        partial(looped, clip=lambda loss: clip_grad_norm_(loss.discriminator.parameters(), 0.01)),
        r"^the loop clips the gradients by norm, to 0\.01: .*=unroll\.ClipGradNorm\(0\.01\)\.$",
    ),
    "clip by value": (
        partial(looped, clip=lambda loss: clip_grad_value_(loss.discriminator.parameters(), 5e-3)),
        r"^the loop clips the gradients by value, to 0\.005: .*=unroll\.ClipGradValue\(",
    ),
    "weight clipping": (
        partial(looped, last=clamp), r"changes .* after the .*\(weight clipping.*project="
    ),
    "weight clipping first": (
        partial(looped, first=clamp),
        r"changes .* before the optimizer's step \(a clip\?\).*project=",
    ),
    "normalised weights": (partial(looped, last=normalised), r"changes .* after the.*project="),
    "penalty": (
        partial(looped, value=lambda d, f, r: terms(d, f, r) + 5 * r1(d, r)),
        r"^D's loss in `step` has a penalty: add \+ unroll\.R1\(10\)\.$",
    ),
    "penalty on fakes": (
        partial(looped, value=lambda d, f, r: (terms(d, f, r) + 2 * r1(d, f)) / 2),
        r"add \+ unroll\.R2\(2\), D's loss times 0\.5 \(weight=\)\.$",
    ),
    "label smoothing": (
        partial(looped, value=one_sided),
        r"labels in `step` are smoothed: pass real_label=0\.9, fake_label=-?0\.0 to unroll\.Crit",
    ),
    "two-sided smoothing": (
        partial(looped, value=lambda d, f, r: terms(d, f, r, (0.8, 0.3)) / 2),
        r"real_label=0\.8, fake_label=0\.3 to unroll\.Criterion, D's loss times 0\.5",
    ),
    "sign": (partial(looped, value=lambda *a: -terms(*a)), r"the opposite sign .*Train D by"),
    "swapped": (partial(looped, value=lambda d, f, r: terms(d, r, f)), "fake and real are swapped"),
    "another loss": (
        partial(looped, value=lambda d, f, r: terms(d, f, r) + d(r).square().mean()),
        r"is another than the objective's: the gradients differ by .*loss\.discriminator_loss",
    ),
    "other samples": (
        partial(looped, value=lambda d, f, r: terms(d, f[:6], r)),
        r"other samples than it is given",
    ),
    "no zero_grad": (partial(looped, zero=False), r"gradients accumulate: call .*zero_grad"),
    "zeroed": (
        partial(looped, clip=lambda loss: loss.optimizer.zero_grad()),
        r"no gradient reaches the optimizer's step",
    ),
    "several steps": (twice, r"takes 2 steps of the optimizer.*Let each call of `step`"),
    "accumulation": (every_second, r"takes 0, 1, 0 steps of the optimizer"),
    "no step": (lambda _: lambda *_: None, r"takes no step of the optimizer that the loss"),
    "scheduler": (partial(looped, last=scheduled), r"'lr' of the optimizer changes in `step`"),
    "frozen in the step": (
        partial(looped, first=frozen),
        r"^'0\.bias', '0\.weight' move in the look-ahead alone.*requires_grad_\(False\)",
    ),
    "second optimizer": (with_a_second, r"changes '4\.bias' after .*another optimizer.*project="),
    "state": (partial(looped, last=of_state), r"the optimizer's state \(.*\) differs|^$"),
}  # fmt: skip


def report_of(name: str, optimizer: str, steps: int = 3) -> unroll.StepReport:
    d = net().to(DEVICE)
    loss = trained(Loss(d, OPTIMIZERS[optimizer](d), unroll.Criterion(bce), unroll_steps=steps))
    loss.optimizer.zero_grad()
    return unroll.check_step(loss, FAULTS[name][0](loss), batch(), batch() + 1)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(name: str, optimizer: str) -> None:
    report = report_of(name, optimizer)
    if (name, optimizer) == ("state", "SGD"):  # which has none
        assert report.ok
        return
    assert report.verdict == "wrong", report
    assert not report.ok
    (words,) = report.suspicions
    assert re.search(FAULTS[name][1], words.removeprefix("step 2: ")), words


def wrong(loss: Loss, step: Step, words: str) -> None:
    report = unroll.check_step(loss, step, batch(), batch() + 1)
    assert report.verdict == "wrong", report
    assert any(re.search(words, text) for text in report.suspicions), report


@pytest.mark.parametrize("game", [unroll.Minimax(), unroll.LeastSquares()])
def test_a_weight_is_found_behind_a_fresh_adam(game: Any) -> None:
    """The parameters after it are the same to 1e-5: the gradients tell."""
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-3), game, unroll_steps=3)

    def halved(_: Any, fake: Tensor, real: Tensor) -> Tensor:
        return loss.discriminator_loss(fake, real) / 2

    wrong(loss, looped(loss, value=halved), r"is 0\.5 times the objective's: divide it by that")


def test_one_step_cannot_tell_a_weight_from_a_clip() -> None:
    for name in ("weight", "clip by norm"):
        (words,) = report_of(name, "SGD", steps=1).suspicions
        assert "weight=" in words
        assert "clips the gradients by norm" in words


def test_a_term_of_the_objective_that_the_loop_lacks() -> None:
    d = net().to(DEVICE)
    game = unroll.Criterion(bce) + unroll.R1(3.0)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), game, unroll_steps=2)
    wrong(loss, looped(loss), r"has no R1, unlike the objective\. Train D by loss\.disc")


def test_labels_of_other_games() -> None:
    d = net().to(DEVICE)
    for game in (unroll.Minimax(), unroll.Criterion(nn.MSELoss(), fake_label=0.1)):
        loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), game, unroll_steps=2)
        mse = isinstance(game, unroll.Criterion)

        def smoothed(d: nn.Module, fake: Tensor, real: Tensor, mse: bool = mse) -> Tensor:
            if not mse:
                return terms(d, fake, real, (0.7, 0.0))
            value: Tensor = (d(real) - 0.7).square().mean() + d(fake).square().mean()
            return value

        wrong(loss, looped(loss, value=smoothed), r"pass real_label=0\.7, fake_label=-?0\.0 to")


def test_parameters_that_another_optimizer_moves() -> None:
    d = net().to(DEVICE)
    first = torch.optim.SGD([p for p in d.parameters() if p.ndim > 1], 0.1)
    second = torch.optim.SGD([p for p in d.parameters() if p.ndim == 1], 0.1)
    with pytest.warns(UserWarning, match="holds no '0.bias'"):
        loss = Loss(d, first, unroll.Criterion(bce), unroll_steps=2)
    step = looped(loss, first=lambda _: second.zero_grad(), last=lambda _: second.step())
    words = r"^'0\.bias', '2\.bias', '4\.bias' move in the loop alone.*all of D's optimizers"
    wrong(loss, step, words)


def test_layers_that_are_frozen_for_the_look_ahead_alone() -> None:
    d = net().to(DEVICE)
    d[0].requires_grad_(False)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll.Criterion(bce), unroll_steps=1)
    step = looped(loss, first=lambda _: d.requires_grad_(True))
    wrong(loss, step, r"^'0\.bias', '0\.weight' move in the loop alone")


class Listed(nn.Module):
    """Layers in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = [nn.Linear(3, 8).to(DEVICE)], nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.blocks[0](x).tanh())
        return output


def test_layers_that_are_not_registered() -> None:
    d = Listed().to(DEVICE)
    theta = [*d.parameters(), *d.blocks[0].parameters()]
    loss = Loss(d, torch.optim.SGD(theta, 0.1), unroll.Criterion(bce), unroll_steps=2)
    before = [p.detach().clone() for p in theta]
    words = r"^the optimizer moves tensors that are not in D \(shapes '\(8, 3\)', '\(8,\)'\)"
    wrong(loss, looped(loss), words)
    assert all(map(torch.equal, before, theta))


def test_another_optimizer_than_that_of_the_loss() -> None:
    d = net().to(DEVICE)
    loss, other = (Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2) for _ in range(2))
    wrong(loss, plain(other), r"takes no step of the optimizer that the loss was made with")


def test_batch_norm_fed_with_real_and_fake_together() -> None:
    d = net(nn.BatchNorm1d(8), nn.LeakyReLU(0.2)).to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll.Criterion(bce), unroll_steps=2)

    def joint(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        on_real, on_fake = d(torch.cat([real, fake])).split(len(real))
        outputs, labels = torch.cat([on_real, on_fake]), torch.ones_like(on_real)
        value: Tensor = 2 * bce(outputs, torch.cat([labels, 0 * labels]))
        return value

    wrong(loss, looped(loss, value=joint), r"real and fake in one batch through D \(BatchNorm\)")


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_step_that_draws_random_numbers_is_inconclusive(optimizer: str) -> None:
    d = net().to(DEVICE)
    loss = Loss(d, OPTIMIZERS[optimizer](d), unroll.Criterion(bce), unroll_steps=2)

    def noisy(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        return terms(d, fake, real + 0.1 * torch.randn_like(real))

    report = unroll.check_step(loss, looped(loss, value=noisy), batch(), batch() + 1)
    assert (report.verdict, report.ok) == ("inconclusive", False)
    assert re.search(r"Random numbers are drawn.*draw noise outside", report.suspicions[0])


def test_a_fault_is_named_whatever_is_drawn() -> None:
    """A weight is one under dropout in a functional form, drawn alike in both."""
    d = net().to(DEVICE)
    game = unroll.Criterion(bce) + unroll.GradientPenalty(1.0)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), game, unroll_steps=2)

    def halved(_: Any, fake: Tensor, real: Tensor) -> Tensor:
        return loss.discriminator_loss(fake, real) / 2

    wrong(loss, looped(loss, value=halved), r"is 0\.5 times the objective's.*weight=0\.5")


def test_a_discriminator_that_is_too_sure_is_inconclusive() -> None:
    d = nn.Linear(3, 1).to(DEVICE)
    with torch.no_grad():
        d.weight.zero_()
        d.bias.fill_(200.0)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), Sure(), unroll_steps=1)
    report = unroll.check_step(loss, plain(loss), batch(), batch())
    assert report.verdict == "inconclusive"
    assert "round-off" in report.suspicions[0]


class Sure:
    """A loss of D that is flat where D is sure."""

    generator_loss = unroll.Minimax.generator_loss

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        value: Tensor = torch.relu(1 - discriminator(real)).mean()
        return value + torch.relu(1 - discriminator(fake)).mean()
