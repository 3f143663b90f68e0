"""``check_step`` on planted faults: every one is found, and the words name the cause."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import unroll
from tests.settings import DEVICE, randn
from tests.test_check_step import OPTIMIZERS, Step, batch, net, plain, trained
from tests.verification.planted import FAULTS
from tests.verification.self_check import answer, failures
from unroll import UnrolledGeneratorLoss as Loss

bce = nn.BCEWithLogitsLoss()
Tweak = Callable[[Tensor, nn.Module, Tensor, Tensor], Tensor]


def terms(d: nn.Module, fake: Tensor, real: Tensor, labels: Any = (1.0, 0.0)) -> Tensor:
    outputs = d(real), d(fake)
    parts = (bce(o, torch.full_like(o, label)) for o, label in zip(outputs, labels, strict=True))
    total: Tensor = sum(parts, torch.zeros((), device=DEVICE))
    return total


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


def of_state(loss: Loss) -> None:
    for state in loss.optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value) and value.ndim:
                value.mul_(2)


def report_of(optimizer: str, steps: int = 3, **put_in: Any) -> unroll.StepReport:
    d = net().to(DEVICE)
    loss = trained(Loss(d, OPTIMIZERS[optimizer](d), unroll.Criterion(bce), unroll_steps=steps))
    loss.optimizer.zero_grad()
    return unroll.check_step(loss, looped(loss, **put_in), batch(), batch() + 1)


@pytest.mark.parametrize("optimizer", ["SGD", "trained Adam"])
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault[0] == "step"])
def test_every_planted_fault_is_named(name: str, optimizer: str) -> None:
    row = answer(("wrong", name, optimizer, "step"))
    assert not failures([row])
    assert " / " not in row["words"], "the cause and nothing else"


def test_a_step_that_changes_the_state() -> None:
    (words,) = report_of("Adam", last=of_state).suspicions
    assert re.search(r"the optimizer's state \(.*\) differs", words)
    assert report_of("SGD", last=of_state).ok  # which has none


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
    halved: dict[str, Any] = {"value": lambda *a: terms(*a) / 2}
    clipped = {"clip": lambda loss: clip_grad_norm_(loss.discriminator.parameters(), 0.01)}
    for fault in (halved, clipped):
        (words,) = report_of("SGD", steps=1, **fault).suspicions
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


@pytest.mark.parametrize("scale", [1e-3, 3e-5, 3e-6])
def test_nothing_is_proposed_that_explains_round_off_alone(scale: float) -> None:
    """The loop's gradient is far smaller than the objective's: anything would fit within its."""
    for seed in range(3):
        torch.manual_seed(seed)
        d = net().to(DEVICE)
        loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)

        def small(d: nn.Module, _: Tensor, real: Tensor) -> Tensor:
            value: Tensor = scale * d(real).square().mean()
            return value

        (words,) = unroll.check_step(loss, looped(loss, value=small), batch(), batch()).suspicions
        assert words.startswith("D's loss in `step` is another than the objective's")


def test_a_fault_that_is_lost_in_the_whole_gradient_is_not_called_a_weight() -> None:
    d = Faint().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll.Wasserstein(), unroll_steps=1)

    def other(d: Any, fake: Tensor, real: Tensor) -> Tensor:
        value: Tensor = loss.discriminator_loss(fake, real) + 1e-5 * d.faint.sum()
        return value

    wrong(loss, looped(loss, value=other), r"gradients differ by 0\.\d%, in 'faint' \(a penalty")


class Faint(nn.Module):
    """A parameter has a gradient far below the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.faint = nn.Linear(3, 1), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(x) + 1e-5 * (x @ self.faint)[:, None]
        return output


def test_labels_that_no_loop_has_are_not_proposed() -> None:
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)

    def odd(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        return terms(d, fake, real, (0.5, 0.45))

    wrong(loss, looped(loss, value=odd), r"^D's loss in `step` is another than the objective's")


def test_a_penalty_of_negative_weight_is_not_proposed() -> None:
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)

    def odd(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        return terms(d, fake, real) - unroll.R1(1.0).discriminator_loss(d, fake, real)

    wrong(loss, looped(loss, value=odd), r"^D's loss in `step` is another than the objective's")


def test_probabilities_under_an_objective_on_logits_are_named() -> None:
    """Among the values at 0.5 the two losses are alike up to a factor."""
    d = nn.Sequential(net(), nn.Sigmoid()).to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)

    def own(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        value: Tensor = -(d(real).log() + (1 - d(fake)).log()).mean()
        return value

    wrong(loss, looped(loss, value=own), "^discriminator: returns what comes out of a sigmoid")


def test_another_loss_is_named_beside_parameters_that_it_does_not_use() -> None:
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)

    def alone(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        return unroll.R1(1.0).discriminator_loss(d, fake, real)

    step = looped(loss, value=alone)
    wrong(loss, step, r"^'4\.bias' move in the look-ahead alone")
    wrong(loss, step, r"^D's loss in `step` is another.*'0\.weight'")


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


@pytest.mark.parametrize("none", [False, True])
def test_zeros_in_place_of_no_gradient_move_a_frozen_layer(none: bool) -> None:
    """Adam's momentum moves what has zeros for a gradient, and skips what has none."""
    d = net().to(DEVICE)
    loss = trained(Loss(d, OPTIMIZERS["Adam"](d), unroll.Criterion(bce), unroll_steps=2))
    d[0].requires_grad_(False)
    zero = lambda _: loss.optimizer.zero_grad(set_to_none=none)  # noqa: E731
    step, weight = looped(loss, zero=False, first=zero), d.get_parameter("0.weight")
    before = weight.detach().clone()
    if none:
        assert unroll.check_step(loss, step, batch(), batch() + 1).ok
    else:
        words = r"^'0\.bias', '0\.weight' get no gradient, but keep zeros .*set_to_none=True"
        wrong(loss, step, words)
    step(batch(), batch() + 1)
    assert torch.equal(weight, before) is none


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


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.5)], ids=["norm", "dropout"])
def test_another_mode_at_the_call(layer: nn.Module) -> None:
    d = net(layer, nn.Tanh()).to(DEVICE)
    optimizer = torch.optim.Adam(d.parameters(), 1e-2)
    loss = Loss(d, optimizer, unroll.Hinge(), unroll_steps=2)
    once = plain(loss)

    def step(fake: Tensor, real: Tensor) -> None:
        d.train()
        once(fake, real)

    for _ in range(3):
        step(batch(), batch() + 1)
    assert unroll.check_step(loss, step, batch(), batch() + 1).ok
    d.eval()
    wrong(loss, step, r"^D's layers '(BatchNorm1d|Dropout)' are in another mode")


def test_an_optimizer_that_trains_another_discriminator_too() -> None:
    """CycleGAN's: the steps of this one are those of the look-ahead."""
    d, other = net().to(DEVICE), net().to(DEVICE)
    optimizer = torch.optim.Adam([*d.parameters(), *other.parameters()], 1e-3)
    objective = unroll.Criterion(nn.MSELoss())
    loss = Loss(d, optimizer, objective, unroll_steps=2)

    def step(fake: Tensor, real: Tensor) -> None:
        optimizer.zero_grad()
        loss.discriminator_loss(fake, real).backward()
        objective.discriminator_loss(other, real, fake).backward()
        optimizer.step()

    assert unroll.check_step(loss, step, batch(), batch() + 1).ok


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


def test_a_change_between_backward_and_step_is_said_to_be_before_the_step() -> None:
    d = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE, torch.float64)
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    loss = unroll.UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)

    def step(fake: Tensor, real: Tensor) -> None:
        optimizer.zero_grad()
        loss.discriminator_loss(fake, real).backward()
        with torch.no_grad():
            for p in d.parameters():
                p.mul_(0.9)
        optimizer.step()

    report = unroll.check_step(loss, step, randn(16, 2), randn(16, 2))
    assert report.verdict == "wrong"
    assert "before the optimizer's step" in report.suspicions[0]
    assert not any("after the optimizer's step" in text for text in report.suspicions)


@pytest.mark.parametrize(
    ("game", "played", "clip", "words"),
    [
        ("plain", "plain", None, r"`step` does not do what transform_gradients= of the loss does"),
        ("plain", "plain", 0.02, r"pass transform_gradients=unroll\.ClipGradNorm\(0\.02\)\."),
        ("plain", "R1(10)", 0.05, r"has a penalty: add \+ unroll\.R1\(10\)\.$"),
        ("R1(10)", "R1(1)", 0.05, r"has R1 with factor 0\.1, unlike"),
        ("plain", "swapped", 0.05, r"fake and real are swapped"),
    ],
)
def test_what_differs_before_a_transform_of_the_loss(
    game: str, played: str, clip: float | None, words: str
) -> None:
    adversarial = unroll.NonSaturating()
    games: dict[str, Any] = {"plain": adversarial, "R1(10)": adversarial + unroll.R1(10.0)}
    games |= {"R1(1)": adversarial + unroll.R1(1.0)}
    d = net()
    how: Any = {"unroll_steps": 3, "transform_gradients": unroll.ClipGradNorm(0.05)}
    loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-2), games[game], **how)

    def value(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        pair = (real, fake) if played == "swapped" else (fake, real)
        found: Tensor = games.get(played, adversarial).discriminator_loss(d, *pair)
        return found

    def clipped(loss: Loss) -> None:
        if clip is not None:
            clip_grad_norm_(loss.discriminator.parameters(), clip)

    wrong(loss, looped(loss, value=value, clip=clipped), words)


@pytest.mark.parametrize("bound", [9.0, 0.2])
def test_a_projection_of_the_loss_that_the_loop_does_not_do(bound: float) -> None:
    def last(loss: Loss) -> None:
        with torch.no_grad():
            for p in loss.discriminator.parameters():
                p.clamp_(-bound, bound)

    d = net()
    loss = Loss(
        d,
        torch.optim.Adam(d.parameters(), 1e-2),
        unroll.NonSaturating(),
        unroll_steps=3,
        project=lambda theta: {n: p.clamp(-0.1, 0.1) for n, p in theta.items()},
    )
    wrong(loss, looped(loss, last=last), r"`step` does not do to .* what project= of the loss does")


def test_gradients_of_the_same_batch_that_are_left_do_not_explain_a_penalty() -> None:
    d = net()
    loss = Loss(d, torch.optim.Adam(d.parameters(), 0.0), unroll.NonSaturating(), unroll_steps=3)
    played = unroll.NonSaturating() + unroll.R1(10.0)

    def value(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        found: Tensor = played.discriminator_loss(d, fake, real)
        return found

    fake, real = batch(), batch() + 1
    step = looped(loss, value=value)
    step(fake, real)  # leaves its gradients
    report = unroll.check_step(loss, step, fake, real)
    assert report.verdict == "wrong"
    assert re.search(r"has a penalty: add \+ unroll\.R1\(10\)", report.suspicions[0])


def test_gradients_that_are_clipped_apart() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList([net(), net()])

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.nets[0](x) + self.nets[1](2 * x)
            return output

    def clip(loss: Loss) -> None:
        for part in loss.discriminator.get_submodule("nets").children():
            clip_grad_norm_(part.parameters(), 0.05)

    d = Several().to(DEVICE)
    loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-3), unroll.NonSaturating(), unroll_steps=3)
    words = r"scales the gradients of D's parts by factors of their own.*\(clipped apart\?\)"
    wrong(loss, looped(loss, clip=clip), words)


def test_a_gradient_that_cancels_to_zero_is_no_parameter_of_another_optimizer() -> None:
    """The objective's in the last bias cancels where every hinge is open."""
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-3), unroll.Hinge(), unroll_steps=1)

    def decayed(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        decay = torch.stack([p.square().sum() for p in d.parameters()]).sum()
        return loss.discriminator_loss(fake, real) + 0.1 * decay

    report = unroll.check_step(loss, looped(loss, value=decayed), 0.1 * batch(), 0.1 * batch())
    assert report.verdict == "wrong"
    assert not any("in the loop alone" in text for text in report.suspicions)


def test_labels_that_are_flipped_at_random_are_not_called_swapped_for_certain() -> None:
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-3), unroll.NonSaturating(), unroll_steps=1)

    def flipped(_: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
        certain = bool(torch.rand(()) < 1)  # always, but it draws
        return loss.discriminator_loss(*((real, fake) if certain else (fake, real)))

    report = unroll.check_step(loss, looped(loss, value=flipped), batch(), batch() + 1)
    assert report.verdict == "inconclusive"
    assert any("Random numbers are drawn" in text for text in report.suspicions)
