"""``check_step``: it passes steps that the look-ahead takes, and gives everything back."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

import unroll
from tests.games import OBJECTIVES
from tests.settings import DEVICE
from tests.snapshot import changes, snapshot
from unroll import UnrolledGeneratorLoss as Loss

Step = Callable[[Any, Any], object]


def net(*middle: nn.Module) -> nn.Sequential:
    layers = middle or (nn.LeakyReLU(0.2),)
    return nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))


def batch(samples: int = 12) -> Tensor:
    return torch.randn(samples, 3, device=DEVICE)


def plain(loss: Loss) -> Step:
    """Return D's step by the loss itself."""

    def step(fake: Any, real: Any) -> None:
        loss.optimizer.zero_grad()
        loss.discriminator_loss(fake, real).backward()
        loss.optimizer.step()

    return step


def trained(loss: Loss, steps: int = 5) -> Loss:
    for _ in range(steps):
        plain(loss)(batch(), batch() + 1)
    return loss


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda d: torch.optim.SGD(d.parameters(), 0.1),
    "momentum": lambda d: torch.optim.SGD(d.parameters(), 0.1, momentum=0.9, nesterov=True),
    "Adam": lambda d: torch.optim.Adam(d.parameters(), 1e-3, betas=(0.5, 0.999)),
    "RMSprop": lambda d: torch.optim.RMSprop(d.parameters(), 5e-4),
    "AdamW groups": lambda d: torch.optim.AdamW(
        [
            {"params": [p for p in d.parameters() if p.ndim == 1], "weight_decay": 0.0},
            {"params": [p for p in d.parameters() if p.ndim > 1], "lr": 3e-3},
        ]
    ),
    "Rprop": lambda d: torch.optim.Rprop(d.parameters(), 1e-3),
    "torchopt Adam": lambda d: torchopt.Adam(d.parameters(), 1e-3),
    "torchopt momentum": lambda d: torchopt.SGD(d.parameters(), 0.1, momentum=0.9),
}


def right(loss: Loss, step: Step, fake: Any = None, real: Any = None) -> None:
    fake, real = batch() if fake is None else fake, batch() + 1 if real is None else real
    report = unroll.check_step(loss, step, fake, real)
    assert report.verdict == "right", report
    assert report.ok
    assert not report.suspicions
    assert report.relative_error < 1e-4


@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loss_of_the_loop_itself_is_right(optimizer: str, warm: int) -> None:
    d = net().to(DEVICE)
    loss = Loss(d, OPTIMIZERS[optimizer](d), unroll.Hinge(), unroll_steps=3)
    trained(loss, warm)
    before = snapshot(d, loss.optimizer)
    right(loss, plain(loss))
    assert not changes(before, d, loss.optimizer)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_right(objective: str) -> None:
    """``GradientPenalty`` draws the same numbers in both."""
    d = net().to(DEVICE)
    for name in ("SGD", "Adam"):
        loss = Loss(d, OPTIMIZERS[name](d), OBJECTIVES[objective], unroll_steps=2)
        right(loss, plain(loss))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: net(nn.BatchNorm1d(8), nn.LeakyReLU(0.2)),
    "bias before BatchNorm": lambda: net(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()),
    "dropout": lambda: net(nn.Dropout(0.5), nn.Tanh()),
    "LSTM": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1)), _Last(nn.LSTM(1, 4, 2, dropout=0.5, batch_first=True)),
        nn.Linear(4, 1),
    ),
    "spectral norm": lambda: net(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh()),
    "dead ReLU": lambda: net(_Dead(), nn.ReLU()),
    "frozen backbone": lambda: _frozen(net()),
}  # fmt: skip


class _Last(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0][:, -1]
        return output


class _Dead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 100 * (torch.arange(8, device=x.device) == 0)


def _frozen(d: nn.Sequential) -> nn.Sequential:
    d[0].requires_grad_(False)
    return d


@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("layers", LAYERS)
def test_layers_that_draw_or_iterate_are_right(layers: str, optimizer: str, warm: int) -> None:
    """Also where ``step`` calls fake before real, and puts D into training mode."""
    d = LAYERS[layers]().to(DEVICE)
    loss = Loss(d, OPTIMIZERS[optimizer](d), unroll_steps=3)
    trained(loss, warm)

    def step(fake: Tensor, real: Tensor) -> None:
        d.train()
        on_fake = nn.functional.softplus(d(fake)).mean()
        on_real = nn.functional.softplus(-d(real)).mean()
        loss.optimizer.zero_grad()
        (on_fake + on_real).backward()
        loss.optimizer.step()

    before = snapshot(d, loss.optimizer)
    right(loss, step)
    assert not changes(before, d, loss.optimizer)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hand_hooked_spectral_norm_is_right() -> None:
    d = net(spectral_norm(nn.Linear(8, 8)), nn.Tanh()).to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=3)
    right(loss, plain(loss))


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.labels = nn.Linear(3, 8), nn.Embedding(10, 8)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        output: Tensor = (self.net(x) * self.labels(label)).sum(1)
        return output


class OwnGame:
    """An own objective for conditional batches, which calls ``discriminator(batch)``."""

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        loss: Tensor = discriminator(fake).square().mean() - discriminator(real).mean()
        return loss

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        value: Tensor = -discriminator(fake).mean()
        return value


@pytest.mark.parametrize("objective", [unroll.Hinge() + unroll.R1(2.0), OwnGame()])
@pytest.mark.parametrize("mapping", [False, True])
def test_a_conditional_discriminator_is_right(objective: Any, mapping: bool) -> None:
    d = Conditional().to(DEVICE)
    label = torch.randint(10, (12,), device=DEVICE)
    loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-2), objective, unroll_steps=2)
    pairs = ({"x": x, "label": label} if mapping else (x, label) for x in (batch(), batch()))
    right(loss, plain(loss), *pairs)


# Loops of others


def by_criterion(d: nn.Module, optimizer: Any, halved: bool = False) -> Step:
    """PyTorch-GAN's step, in which D's loss is halved."""
    adversarial_loss = nn.BCEWithLogitsLoss()

    def step(fake: Tensor, real: Tensor) -> None:
        valid = torch.ones(len(real), 1, device=DEVICE)
        optimizer.zero_grad()
        real_loss = adversarial_loss(d(real), valid)
        fake_loss = adversarial_loss(d(fake.detach()), 1 - valid)
        d_loss = (real_loss + fake_loss) / (2 if halved else 1)
        d_loss.backward()
        optimizer.step()

    return step


def test_a_loop_in_the_style_of_pytorch_gan() -> None:
    d = net().to(DEVICE)
    optimizer = torch.optim.Adam(d.parameters(), 2e-4, betas=(0.5, 0.999))
    game = unroll.Criterion(nn.BCEWithLogitsLoss(), weight=0.5)
    right(Loss(d, optimizer, game, unroll_steps=3), by_criterion(d, optimizer, halved=True))


def by_relativistic_average(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
    on_real, on_fake = d(real), d(fake)
    bce, ones = nn.functional.binary_cross_entropy_with_logits, torch.ones_like(on_real)
    return bce(on_real - on_fake.mean(), ones) + bce(on_fake - on_real.mean(), 0 * ones)


def by_wasserstein(d: nn.Module, fake: Tensor, real: Tensor) -> Tensor:
    on_fake, on_real = d(torch.cat([fake, real])).split(len(fake))
    value: Tensor = on_fake.mean() - on_real.mean()
    return value


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(
    ("game", "d_loss"),
    [
        (unroll.RelativisticAverage(), by_relativistic_average),
        (unroll.Wasserstein(), by_wasserstein),
    ],
)
def test_a_gradient_that_is_cancelled_to_round_off(game: Any, d_loss: Any, scale: float) -> None:
    """That of the last bias: other operations for the same game round otherwise."""
    for seed in range(5):
        torch.manual_seed(seed)
        d = nn.Sequential(nn.Linear(64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)).to(DEVICE)
        optimizer = torch.optim.Adam(d.parameters(), 2e-4, betas=(0.5, 0.999))

        def step(fake: Tensor, real: Tensor, d: Any = d, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            d_loss(d, fake, real).backward()
            optimizer.step()

        pair = [scale * torch.rand(7, 64, device=DEVICE) for _ in range(2)]
        right(Loss(d, optimizer, game, unroll_steps=2), step, *pair)


class LightningOptimizer:
    """As Lightning's: it passes a closure, and clips in it what backward has left."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step(closure=lambda: None)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def test_manual_optimisation_in_the_style_of_lightning() -> None:
    d = net().to(DEVICE)
    inner = torch.optim.Adam(d.parameters(), 1e-3)
    optimizer: Any = LightningOptimizer(inner)
    loss = Loss(d, optimizer, unroll.Criterion(nn.BCEWithLogitsLoss()), unroll_steps=2)
    one = by_criterion(d, optimizer)

    def step(fake: Tensor, real: Tensor) -> None:
        d.requires_grad_(True)
        one(fake, real)
        d.requires_grad_(False)

    right(loss, step)
    d.requires_grad_(False)  # as in G's step
    right(loss, step)


def test_a_closure_brings_the_gradients() -> None:
    d = net().to(DEVICE)
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    loss = Loss(d, optimizer, unroll_steps=2)

    def step(fake: Tensor, real: Tensor) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            value = loss.discriminator_loss(fake, real)
            value.backward()
            return value.item()

        optimizer.step(closure)

    right(loss, step)


def test_a_step_in_parts_and_with_a_scaler() -> None:
    d = net().to(DEVICE)
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    loss = Loss(d, optimizer, unroll_steps=2)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)

    def step(fake: Tensor, real: Tensor) -> None:
        optimizer.zero_grad()
        for x, y in zip(fake.split(3), real.split(3), strict=True):
            scaler.scale(loss.discriminator_loss(x, y) / 4).backward()
        scaler.step(optimizer)
        scaler.update()

    right(loss, step)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_scales(fused: bool) -> None:
    d = net().to(DEVICE)
    optimizer = torch.optim.Adam(d.parameters(), 1e-3, fused=fused)
    loss = Loss(d, optimizer, unroll_steps=2)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=1)

    def step(fake: Tensor, real: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(loss.discriminator_loss(fake, real)).backward()
        scaler.step(optimizer)
        scaler.update()

    report = unroll.check_step(loss, step, batch(), batch() + 1, also=[scaler])
    assert report.ok, report
    assert scaler.get_scale() == 1024.0
    step(batch(), batch())
    assert scaler.get_scale() == 2048.0


def test_a_compiled_discriminator_runs_uncompiled() -> None:
    d = net().to(DEVICE)
    wrapped: Any = torch.compile(d, backend="aot_eager")
    loss = Loss(wrapped, torch.optim.Adam(d.parameters(), 1e-3), unroll_steps=2)
    right(loss, plain(loss))


def test_mixed_precision_is_checked_under_the_loops_autocast() -> None:
    d = net().to(DEVICE)
    loss = trained(Loss(d, torch.optim.Adam(d.parameters(), 1e-3), unroll_steps=2))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        right(loss, plain(loss))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_autocast_rounds_otherwise_in_one_call_of_d(factor: float) -> None:
    """Which is no fault, though far more than float32's round-off; a weight is one."""
    for seed in range(3):
        torch.manual_seed(seed)
        d = net().to(DEVICE)
        loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-3), unroll_steps=2)

        def step(fake: Tensor, real: Tensor, d: Any = d, loss: Loss = loss) -> None:
            on_fake, on_real = d(torch.cat([fake, real])).split(len(fake))
            softplus = nn.functional.softplus
            loss.optimizer.zero_grad()
            (factor * (softplus(on_fake).mean() + softplus(-on_real).mean())).backward()
            loss.optimizer.step()

        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            report = unroll.check_step(loss, step, batch(), batch() + 1)
        assert (report.verdict == "wrong") is (factor != 1), report


def test_a_deep_discriminator_with_layer_norms_under_autocast() -> None:
    """PyTorch sums their gradients in bfloat16 on a CPU, a percent off; so must the look-ahead."""
    for seed in range(3):
        torch.manual_seed(seed)
        blocks = [
            nn.Sequential(nn.Linear(32 if i else 3, 32), nn.LayerNorm(32), nn.ReLU())
            for i in range(6)
        ]
        d = nn.Sequential(*blocks, nn.Linear(32, 1)).to(DEVICE)
        loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-3), unroll_steps=2)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            right(trained(loss), plain(loss))


LISTS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "torch": lambda weights, biases: [
        torch.optim.Adam(weights, 1e-3), torch.optim.SGD(biases, 0.1, momentum=0.9)
    ],
    "both": lambda weights, biases: [
        torchopt.SGD(weights, 0.1, momentum=0.9), torch.optim.RMSprop(biases, 1e-3)
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("halved", [False, True])
def test_a_list_of_optimizers(kind: str, halved: bool) -> None:
    d = net().to(DEVICE)
    parts = ([p for p in d.parameters() if (p.ndim > 1) is weight] for weight in (True, False))
    optimizers = LISTS[kind](*parts)
    loss = Loss(d, optimizers, unroll_steps=3)

    def step(fake: Any, real: Any) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = loss.discriminator_loss(fake, real)
        torch.autograd.backward(value / 2 if halved else value)
        for optimizer in optimizers:
            optimizer.step()

    step(batch(), batch() + 1)
    before = snapshot(d, *optimizers)
    report = unroll.check_step(loss, step, batch(), batch() + 1)
    assert not changes(before, d, *optimizers)
    assert report.ok is not halved
    assert not halved or "weight=0.5" in report.suspicions[0]


def test_k_0_is_checked_by_one_step() -> None:
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=0)
    calls: list[bool] = []
    one = plain(loss)

    def counted(fake: Any, real: Any) -> None:
        calls.append(True)
        one(fake, real)

    right(loss, counted)
    assert len(calls) == 1
    loss.unroll_steps = 3
    right(loss, counted)
    assert len(calls) == 4


class PenaltyOnFakes:
    """A penalty that differentiates in the fakes as they are given."""

    generator_loss = unroll.Minimax.generator_loss

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(discriminator(fake).sum(), fake, create_graph=True)
        value: Tensor = discriminator(real).square().mean() + gradient.square().sum()
        return value


def test_fakes_can_be_differentiated_in_and_the_batch_is_left_alone() -> None:
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), PenaltyOnFakes(), unroll_steps=2)
    fake, real = batch().requires_grad_(), batch()

    def step(x: Tensor, y: Tensor) -> None:
        loss.optimizer.zero_grad()
        loss.objective.discriminator_loss(d, x, y).backward()
        loss.optimizer.step()
        x.zero_()
        y.zero_()

    before = fake.detach().clone(), real.clone()
    right(loss, step, fake, real)
    assert torch.equal(fake, before[0])
    assert torch.equal(real, before[1])
    assert fake.grad is None


# What is given back


class Average:
    """An average of weights with a state dict, in an object of its own."""

    def __init__(self, d: nn.Module) -> None:
        self.d, self.inner = d, Holder(copy.deepcopy(d.state_dict()))

    def update(self) -> None:
        for name, value in self.d.state_dict().items():
            self.inner.weights[name].copy_(self.inner.weights[name] + value)

    def state_dict(self) -> dict[str, Tensor]:
        return self.inner.weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.inner.weights[name].copy_(value)


class Holder:
    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights


def generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_everything_is_given_back_bit_for_bit(fresh: bool, fails: bool) -> None:
    d: Any = net(
        nn.BatchNorm1d(8), nn.Dropout(0.5), parametrizations.spectral_norm(nn.Linear(8, 8))
    )
    d.to(DEVICE)
    g = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(DEVICE)
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    average = Average(d)
    loss = Loss(d, optimizer, unroll_steps=3)
    if not fresh:
        trained(loss)
        scheduler.step()
    d[0].weight.grad = torch.ones_like(d[0].weight)
    d[0].bias.grad = None
    d[1].eval()
    calls: list[bool] = []

    def step(fake: Tensor, real: Tensor) -> None:
        calls.append(True)
        d.train()
        d.requires_grad_(True)
        fake = g(torch.randn(12, 2, device=DEVICE)).detach() * random.random() + np.random.rand()
        plain(loss)(fake, real)
        scheduler.step()
        average.update()
        d[0].weight.data = d[0].weight.data + 1  # a new storage
        d[0].remembered = fake
        optimizer.param_groups[0]["betas"] = (0.0, 0.0)
        d.requires_grad_(False)
        if fails and len(calls) == 2:
            raise KeyError("from the step")

    held = d, g, optimizer, scheduler, average, loss._moving
    before, pointer = snapshot(*held), d[0].weight.data_ptr()
    also = [g, scheduler, average]
    if fails:
        with pytest.raises(KeyError, match="from the step"):
            unroll.check_step(loss, step, batch(), batch(), also=also)
    else:
        assert not unroll.check_step(loss, step, batch(), batch(), also=also).ok
    assert len(calls) == (2 if fails else 3)
    assert not changes(before, *held)
    assert d[0].weight.data_ptr() == pointer
    assert fails or not fresh or not optimizer.state


def test_the_random_generators_go_on_from_where_they_stood() -> None:
    d = net().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)
    fake, real, before = batch(), batch(), generators()

    def step(fake: Tensor, real: Tensor) -> None:
        noise = torch.randn_like(real) + random.random() + float(np.random.rand())
        plain(loss)(fake, real + noise)

    unroll.check_step(loss, step, fake, real)
    assert generators() == before


def test_an_objective_that_keeps_state_gets_it_back() -> None:
    class Counting(OwnGame):
        def __init__(self) -> None:
            self.calls = 0

        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            self.calls += 1
            return super().discriminator_loss(discriminator, fake, real)

    d, game = net().to(DEVICE), Counting()
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), game, unroll_steps=2)
    right(loss, plain(loss))
    assert game.calls == 0


# Messages


def test_what_cannot_be_compared_is_refused() -> None:
    d = net().to(DEVICE)
    batches = batch(), batch()
    message = r"^loss: must hold an optimizer .* it holds a (\w+)\. .*torchopt.Optimizer\(D"
    optimizers = (
        torchopt.adam(1e-3),
        torchopt.MetaAdam(d),
        torchopt.FuncOptimizer(torchopt.sgd(1)),
        [torchopt.MetaAdam(d)],
    )
    for optimizer in optimizers:
        loss = Loss(d, optimizer, unroll_steps=1)
        with pytest.raises(TypeError, match=message):
            unroll.check_step(loss, plain(loss), *batches)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=1)
    with pytest.raises(TypeError, match=r"^step: must be your update of D.*got NoneType. Put D's"):
        unroll.check_step(loss, None, *batches)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^also: must hold objects with state_dict.*got int"):
        unroll.check_step(loss, plain(loss), *batches, also=[3])
    with pytest.raises(TypeError, match=r"^also: must hold objects with state_dict.*got object"):
        unroll.check_step(loss, plain(loss), *batches, also=object())  # type: ignore[arg-type]


def test_a_step_that_a_scaler_skips_is_inconclusive() -> None:
    d = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer, scaler = torch.optim.Adam(d.parameters()), torch.amp.GradScaler("cpu", 1e30)
    loss = Loss(d, optimizer, unroll.Wasserstein(), unroll_steps=3)

    def step(fake: Tensor, real: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss.discriminator_loss(fake, real)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()

    with torch.autocast("cpu", torch.float16):
        fake, real = torch.randn(4, 2), torch.randn(4, 2)
        report = unroll.check_step(loss, step, fake, real, also=[scaler])
    assert report.verdict == "inconclusive"
    assert "GradScaler" in report.suspicions[0]


def test_state_that_is_not_given_back_is_inconclusive() -> None:
    class Average:
        value = 0.0

    class Regularised(unroll.Hinge):
        """As LeCam's, which keeps averages of D's outputs in an object."""

        def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            on_fake = d(fake)
            average.value = 0.5 * average.value + 0.5 * on_fake.mean().item()
            penalty: Tensor = (on_fake - average.value).square().mean()
            return super().discriminator_loss(d, fake, real) + penalty

    average = Average()
    d = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.1), Regularised(), unroll_steps=3)
    report = unroll.check_step(loss, plain(loss), torch.randn(8, 2), torch.randn(8, 2))
    assert report.verdict == "inconclusive"
    assert "an object of a class of your own" in report.suspicions[0]


def test_a_penalty_in_what_d_returns_of_its_input() -> None:
    class Augmented(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.net(x)

    def d_loss(d: Any, fake: Tensor, real: Tensor) -> Tensor:
        x, on_real = d(real.detach().requires_grad_())
        (slope,) = torch.autograd.grad(on_real.sum(), x, create_graph=True)
        penalty: Tensor = slope.square().sum(1).mean()
        hinges: Tensor = (1 - on_real).relu().mean() + (1 + d(fake)[1]).relu().mean()
        return hinges + penalty

    d = Augmented()
    game = unroll.Losses(d_loss, lambda d, fake, real: -d(fake)[1].mean())  # noqa: ARG005
    loss = Loss(d, torch.optim.Adam(d.parameters(), 1e-3), game, unroll_steps=2)
    right(loss, plain(loss))


def test_a_discriminator_that_changes_itself_is_refused_as_by_the_loss() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.u = net(), nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.u.data = 0.5 * self.u.data
            output: Tensor = self.u * self.net(x)
            return output

    d = Overwriting().to(DEVICE)
    loss = Loss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=2)
    with pytest.raises(
        RuntimeError, match="must not change its parameters in place; it changed 'u'"
    ):
        unroll.check_step(loss, plain(loss), batch(), batch())
