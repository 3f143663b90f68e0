"""Planted faults, each with the self-check that can see it and the words that name its cause."""

from collections.abc import Callable
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.nn import functional as F
from torchopt.base import GradientTransformation

import unroll
from tests.players import called
from tests.settings import DEVICE

Loss = unroll.UnrolledGeneratorLoss
Step = Callable[[Any, Any], object]
GAME = unroll.Criterion(nn.BCEWithLogitsLoss())
PENALISED = GAME + unroll.R1(1.0)


def mlp(*middle: nn.Module) -> nn.Module:
    """Return a small D, in float32."""
    layers = middle or (nn.Tanh(),)
    return nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 1)).to(DEVICE)


class Built:
    """D, its optimizer, the look-ahead's loss and the loop's step; a fault changes some of them."""

    def __init__(self, build: Callable[[Any], torch.optim.Optimizer], d: nn.Module) -> None:
        self.build, self.d = build, d
        self.optimizer: Any = build(d.parameters())
        self.game: Any = GAME
        self.options: dict[str, Any] = {}
        self.before: Callable[[], object] = lambda: None  # the optimizer's step
        self.after: Callable[[], object] = lambda: None
        self.d_loss: Callable[[Any, Any], Tensor] = self.own
        self.step: Step = self.whole

    def own(self, fake: Any, real: Any) -> Tensor:
        """Return the objective's loss of D."""
        loss: Tensor = self.game.discriminator_loss(called(self.d), fake, real)
        return loss

    def whole(self, fake: Any, real: Any) -> None:
        """Take the loop's step."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.d_loss(fake, real))
        self.before()
        self.optimizer.step()
        self.after()

    def loss(self, steps: int = 3) -> Loss:
        """Return the loss of the look-ahead."""
        return Loss(self.d, self.optimizer, self.game, unroll_steps=steps, **self.options)


# What the loop does otherwise than the look-ahead: check_step.


def half(b: Built) -> None:
    b.d_loss = lambda fake, real: 0.5 * b.own(fake, real)


def clipped_norm(b: Built) -> None:
    b.before = lambda: nn.utils.clip_grad_norm_(b.d.parameters(), 0.05)


def clipped_value(b: Built) -> None:
    b.before = lambda: nn.utils.clip_grad_value_(b.d.parameters(), 0.02)


def clipped_weights(b: Built) -> None:
    def clip() -> None:
        for p in b.d.parameters():
            p.data.clamp_(-0.2, 0.2)

    b.after = clip


def normalised_weights(b: Built) -> None:
    def normalise() -> None:
        with torch.no_grad():
            b.d.get_parameter("0.weight").div_(b.d.get_parameter("0.weight").norm())

    b.after = normalise


def more_penalty(b: Built) -> None:
    b.d_loss = lambda fake, real: PENALISED.discriminator_loss(b.d, fake, real)


def no_penalty(b: Built) -> None:
    b.game = PENALISED
    b.d_loss = lambda fake, real: GAME.discriminator_loss(b.d, fake, real)


def weaker_penalty(b: Built) -> None:
    b.game = GAME + unroll.R1(0.1)
    b.d_loss = lambda fake, real: PENALISED.discriminator_loss(b.d, fake, real)


def second_optimizer(b: Built) -> None:
    named = dict(b.d.named_parameters())
    b.optimizer = b.build([p for n, p in named.items() if "weight" in n])
    other = b.build([p for n, p in named.items() if "bias" in n])
    b.after = other.step


def frozen(b: Built) -> None:
    def step(fake: Any, real: Any) -> None:
        b.d.get_submodule("0").requires_grad_(False)
        b.whole(fake, real)
        b.d.get_submodule("0").requires_grad_(True)

    b.step = step


def smoothed(b: Built) -> None:
    game = unroll.Criterion(nn.BCEWithLogitsLoss(), real_label=0.9)
    b.d_loss = lambda fake, real: game.discriminator_loss(b.d, fake, real)


def no_zero_grad(b: Built) -> None:
    def step(fake: Any, real: Any) -> None:
        torch.autograd.backward(b.own(fake, real))
        b.optimizer.step()

    torch.autograd.backward(b.own(torch.randn(8, 3), torch.randn(8, 3)))  # of G's step
    b.step = step


def two_steps(b: Built) -> None:
    def step(fake: Any, real: Any) -> None:
        b.whole(fake, real)
        b.whole(fake, real)

    b.step = step


def no_step(b: Built) -> None:
    b.step = lambda fake, real: torch.autograd.backward(b.own(fake, real))


def sign(b: Built) -> None:
    b.d_loss = lambda fake, real: -b.own(fake, real)


def swapped(b: Built) -> None:
    b.d_loss = lambda fake, real: b.own(real, fake)


def scheduler(b: Built) -> None:
    b.after = torch.optim.lr_scheduler.ExponentialLR(b.optimizer, 0.9).step


def accumulated(b: Built) -> None:
    """Two halves of the batch without a division: twice the gradient."""

    def step(fake: Any, real: Any) -> None:
        b.optimizer.zero_grad()
        for f, r in zip(fake.chunk(2), real.chunk(2), strict=True):
            torch.autograd.backward(b.own(f, r))
        b.optimizer.step()

    b.step = step


def joint_batch(b: Built) -> None:
    b.d = mlp(nn.BatchNorm1d(8), nn.Tanh())
    b.optimizer = b.build(b.d.parameters())

    def d_loss(fake: Any, real: Any) -> Tensor:
        on_real, on_fake = b.d(torch.cat([real, fake])).chunk(2)
        return GAME._against(on_real, 1.0) + GAME._against(on_fake, 0.0)

    b.d_loss = d_loss


def _plays(game: Any) -> Callable[[Built], None]:
    def plant(b: Built) -> None:
        b.d_loss = lambda fake, real: game.discriminator_loss(b.d, fake, real)

    return plant


def real_half_only(b: Built) -> None:
    b.d_loss = lambda fake, real: GAME._against(b.d(real), 1.0) + 0.0 * b.d(fake).sum()


def clipped_first(b: Built) -> None:
    def step(fake: Any, real: Any) -> None:
        for p in b.d.parameters():
            p.data.clamp_(-0.2, 0.2)
        b.whole(fake, real)

    b.step = step


def penalty_on_fakes(b: Built) -> None:
    game = GAME + unroll.R2(2.0)
    b.d_loss = lambda fake, real: 0.5 * game.discriminator_loss(b.d, fake, real)


def smoothed_twice(b: Built) -> None:
    _plays(unroll.Criterion(nn.BCEWithLogitsLoss(), 0.8, 0.3, weight=0.5))(b)


def extra_term(b: Built) -> None:
    b.d_loss = lambda fake, real: b.own(fake, real) + b.d(real).square().mean()


def other_samples(b: Built) -> None:
    b.d_loss = lambda fake, real: b.own(fake[:6], real)


def zeroed(b: Built) -> None:
    b.before = lambda: b.optimizer.zero_grad()


def accumulated_over_calls(b: Built) -> None:
    calls: list[bool] = []

    def step(fake: Any, real: Any) -> None:
        torch.autograd.backward(0.5 * b.own(fake, real))
        calls.append(True)
        if len(calls) % 2 == 0:
            b.optimizer.step()
            b.optimizer.zero_grad()

    b.step = step


def moved_again(b: Built) -> None:
    b.after = torch.optim.SGD([b.d.get_parameter("2.bias")], 0.1).step


def forgotten_of_a_list(b: Built) -> None:
    """One of two optimizers is not stepped."""
    named = dict(b.d.named_parameters())
    first, second = (b.build([p for n, p in named.items() if n[0] == i]) for i in "02")

    def step(fake: Any, real: Any) -> None:
        first.zero_grad()
        second.zero_grad()
        torch.autograd.backward(b.own(fake, real))
        second.step()

    b.optimizer, b.step = [first, second], step


def decayed(b: Built) -> None:
    def decay() -> None:
        with torch.no_grad():
            for p in b.d.parameters():
                p.mul_(0.99)

    b.after = decay


def centralised(b: Built) -> None:
    def centre() -> None:
        grad = b.d.get_parameter("0.weight").grad
        assert grad is not None
        grad.sub_(grad.mean(1, keepdim=True))

    b.before = centre


# What makes the gradient wrong: check_gradients.


class HalfTanh(torch.autograd.Function):
    """Tanh whose second derivative is lost, as in many hand-written kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return tanh(x)."""
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the first derivative, as a constant."""
        x: Tensor = ctx.saved_tensors[0]
        return gradients[0] * (1 - x.detach().tanh() ** 2)


class Slope(torch.autograd.Function):
    """The slope of tanh, whose own slope is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return 1 - tanh(x)^2."""
        ctx.save_for_backward(x)
        return 1 - x.tanh() ** 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the second derivative of tanh, as a constant."""
        y = ctx.saved_tensors[0].detach().tanh()
        slope: Tensor = gradients[0] * -2 * y * (1 - y**2)
        return slope


class TwiceTanh(torch.autograd.Function):
    """Tanh whose third derivative is lost, which only a penalty needs."""

    forward = staticmethod(HalfTanh.forward)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the first derivative, with a second."""
        slope: Tensor = gradients[0] * Slope.apply(ctx.saved_tensors[0])
        return slope


class Twice(nn.Module):
    """A layer of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tanh(x)."""
        y: Tensor = TwiceTanh.apply(x)
        return y


class HandNormed(nn.Module):
    """A linear layer with a spectral norm by hand, which moves u in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("u", F.normalize(torch.randn(8), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the weight over its largest singular value."""
        u = self.get_buffer("u")
        with torch.no_grad():
            v = F.normalize(self.weight.t() @ u, dim=0)
            u.copy_(F.normalize(self.weight @ v, dim=0))
        sigma = u.clone() @ self.weight @ v
        return F.linear(x, self.weight / sigma).tanh()


class Wrong(nn.Module):
    """A layer of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tanh(x)."""
        y: Tensor = HalfTanh.apply(x)
        return y


class Game:
    """The game with one method replaced."""

    def __init__(self, **methods: Callable[..., Tensor]) -> None:
        self.discriminator_loss = methods.get("discriminator_loss", GAME.discriminator_loss)
        self.generator_loss = methods.get("generator_loss", GAME.generator_loss)


def _fed(change: Callable[[Tensor], Tensor]) -> Callable[[Built], None]:
    def plant(b: Built) -> None:
        b.game = Game(
            discriminator_loss=lambda d, fake, real: GAME.discriminator_loss(d, change(fake), real)
        )

    return plant


def _with_d(make: Callable[[], nn.Module]) -> Callable[[Built], None]:
    def plant(b: Built) -> None:
        b.d = make().to(DEVICE)
        b.optimizer = b.build(b.d.parameters())

    return plant


def _transformed(detach: bool) -> GradientTransformation:
    def update(updates: Any, state: Any, **_: Any) -> Any:
        norm = torch.stack([g.square().sum() for g in updates]).sum().sqrt()
        norm = norm.detach() if detach else norm
        return tuple(g * (0.05 / norm) for g in updates), state

    return GradientTransformation(lambda _: (), update)


def _strong(make: Callable[[], nn.Module], game: Any) -> Callable[[Built], None]:
    """Plant a D at thirty times the learning rate, where a small fault shows."""

    def plant(b: Built) -> None:
        _with_d(make)(b)
        b.game = game
        for group in b.optimizer.param_groups:
            group["lr"] *= 30

    return plant


def detaching_transformation(b: Built) -> None:
    adam = isinstance(b.optimizer, torch.optim.Adam)
    rule: Any = torchopt.adam(0.01) if adam else torchopt.sgd(0.1)
    b.optimizer = torchopt.Optimizer(b.d.parameters(), torchopt.chain(_transformed(True), rule))


def detaching_hook(b: Built) -> None:
    b.d.get_parameter("0.weight").register_hook(lambda g: g * (0.05 / g.norm().detach()))


def detaching_projection(b: Built) -> None:
    b.options["project"] = lambda theta: {k: p / p.norm().detach() for k, p in theta.items()}


def wrong_objective(b: Built) -> None:
    b.game = Game(
        discriminator_loss=lambda d, fake, real: (
            HalfTanh.apply(d(fake)).mean() - HalfTanh.apply(d(real)).mean()
        )
    )


def detached_reals(b: Built) -> None:
    def generator_loss(d: Any, fake: Any, real: Any) -> Tensor:
        return F.softplus(d(real).detach() - d(fake)).mean()

    def discriminator_loss(d: Any, fake: Any, real: Any) -> Tensor:
        return F.softplus(d(fake) - d(real)).mean()

    b.game = Game(generator_loss=generator_loss, discriminator_loss=discriminator_loss)


def changing_backward_hook(b: Built) -> None:
    b.d.get_submodule("1").register_full_backward_hook(lambda *a: (1.5 * a[1][0],))


def infinite_slope(b: Built) -> None:
    b.game = Game(generator_loss=lambda _, fake, __: (fake - fake.detach()).square().sum().sqrt())


class DetachedGate(nn.Module):
    """A gate that is computed without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the detached gate."""
        return x * x.detach().sigmoid()


class Listed(nn.Module):
    """Layers in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = [nn.Linear(3, 8), nn.Linear(8, 8)], nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        for block in self.blocks:
            x = torch.tanh(block(x))
        output: Tensor = self.head(x)
        return output


def unregistered(b: Built) -> None:
    d = Listed()
    b.d = d
    b.optimizer = b.build([*d.parameters(), *(p for m in d.blocks for p in m.parameters())])


Fault = tuple[str, Callable[[Built], None], str]  # the check, what plants it, words to be found
FAULTS: dict[str, Fault] = {
    "half the loss": (
        "step", half, r"^D's loss in `step` is 0\.5 times .* or pass weight=0\.5 to unroll\.Crit"
    ),
    "clipping by norm": (
        "step", clipped_norm,
        r"^the loop clips the gradients by norm, to 0\.05: .*=unroll\.ClipGradNorm\(0\.05\)\.$",
    ),
    "clipping by value": (
        "step", clipped_value,
        r"^the loop clips the gradients by value, to 0\.02: .*=unroll\.ClipGradValue\(0\.02\)\.$",
    ),
    "weight clipping": (
        "step", clipped_weights, r"changes .* after the .*\(weight clipping.*project="
    ),
    "weight clipping before the step": (
        "step", clipped_first, r"changes .* before the optimizer's step \(a clip\?\).*project="
    ),
    "weight normalisation": ("step", normalised_weights, r"changes '0\.weight' after .*project="),
    "a penalty that the objective lacks": (
        "step", more_penalty, r"has a penalty: add \+ unroll\.R1\(1\)\.$"
    ),
    "a penalty on fakes, halved": (
        "step", penalty_on_fakes, r"add \+ unroll\.R2\(1\), D's loss times 0\.5 \(weight=\)\.$"
    ),
    "a penalty that the loop lacks": (
        "step", no_penalty, r"has no R1, unlike the objective\. Train D by loss\.disc"
    ),
    "another factor of the penalty": ("step", weaker_penalty, "has R1 with factor 10,"),
    "a second optimizer": (
        "step", second_optimizer,
        r"^'0\.bias', '2\.bias' move in the loop alone.*all of D's optimizers",
    ),
    "a parameter that moves twice": (
        "step", moved_again, r"changes '2\.bias' after .*another optimizer.*project="
    ),
    "one optimizer of a list": ("step", forgotten_of_a_list, "takes 0, 1, 0, 1 steps"),
    "a frozen layer": (
        "step", frozen,
        r"^'0\.bias', '0\.weight' move in the look-ahead alone.*requires_grad_\(False\)",
    ),
    "label smoothing": (
        "step", smoothed, r"smoothed: pass real_label=0\.9, fake_label=0\.0 to unroll\.Criterion\."
    ),
    "label smoothing of both, halved": (
        "step", smoothed_twice, r"real_label=0\.8, fake_label=0\.3 to .*, D's loss times 0\.5"
    ),
    "no zero_grad": ("step", no_zero_grad, r"gradients accumulate: call .*zero_grad"),
    "zeroed gradients": ("step", zeroed, "no gradient reaches the optimizer's step"),
    "two steps of D": ("step", two_steps, r"takes 2 steps of the optimizer.*Let each call of `st"),
    "no step of the optimizer": ("step", no_step, "takes no step of the optimizer that the loss"),
    "accumulation over calls": ("step", accumulated_over_calls, "takes 0, 1 steps of the opt"),
    "the opposite sign": ("step", sign, "the opposite sign .*Train D by"),
    "swapped batches": ("step", swapped, "fake and real are swapped"),
    "a scheduler in the step": (
        "step", scheduler, "'lr' of the optimizer changes in `step`.*Step the scheduler outside"
    ),
    "accumulation without a division": ("step", accumulated, "2 times the objective"),
    "real and fake in one batch": ("step", joint_batch, r"in one batch through D \(BatchNorm\)"),
    "another game": ("step", _plays(unroll.Hinge()), r"is unroll\.Hinge\(\), not"),
    "another game, pairing": (
        "step", _plays(unroll.RelativisticPairing()), r"is unroll\.RelativisticPairing\(\), not"
    ),
    "another game, halved": (
        "step", _plays(unroll.Criterion(nn.MSELoss(), weight=0.25)),
        r"is unroll\.LeastSquares\(\), D's loss times 0\.5",
    ),
    "one term of the loss": ("step", real_half_only, "is another than the objective's"),
    "another term in the loss": (
        "step", extra_term, r"is another .*: the gradients differ by .*loss\.discriminator_loss"
    ),
    "other samples": ("step", other_samples, "other samples than it is given"),
    "weight decay by hand": ("step", decayed, "changes .* after .*project="),
    "gradient centralisation": ("step", centralised, "is another than the objective's"),
    "detached fakes": ("gradients", _fed(lambda x: x.detach()), "detaches the fakes"),
    "fakes through .data": ("gradients", _fed(lambda x: x.clone().data), "detaches the fakes"),
    "fakes through lists": (
        "gradients", _fed(lambda x: torch.tensor(x.tolist(), dtype=x.dtype)), "detaches the fakes"
    ),
    "a wrong double backward": (
        "gradients", _with_d(lambda: mlp(Wrong())), r"second derivative of layer 1 \(Wrong\)"
    ),
    "a wrong double backward, deep": (
        "gradients", _with_d(lambda: mlp(nn.Sequential(nn.Linear(8, 8), Wrong()))),
        r"second derivative of layer 1\.1 \(Wrong\)",
    ),
    "a wrong double backward behind in-place layers": (
        "gradients",
        _with_d(lambda: mlp(nn.ReLU(inplace=True), nn.Linear(8, 8), Wrong())),
        r"second derivative of layer 3 \(Wrong\)",
    ),
    "a wrong third derivative under a penalty": (
        "gradients", _strong(lambda: mlp(Twice()), GAME + unroll.R1(10.0)),
        r"^wrong third derivative of layer 1 \(Twice\)"
    ),
    "a spectral norm by hand": (
        "gradients", _strong(lambda: mlp(HandNormed()), GAME),
        r"layer 1 \(HandNormed\).*what it updates in forward.*'1\.u'.*spectral_norm",
    ),
    "a detached gate": (
        "gradients", _with_d(lambda: mlp(DetachedGate())), r"layer 1 \(DetachedGate\)"
    ),
    "a detached norm in a transformation": (
        "gradients", detaching_transformation, "the optimizer's update"
    ),
    "a detached norm in a hook": ("gradients", detaching_hook, r"gradient hook of '0\.weight'"),
    "a detached norm in a projection": ("gradients", detaching_projection, "of project="),
    "an objective with a wrong function": ("gradients", wrong_objective, "^the objective"),
    "detached reals": ("gradients", detached_reals, "^the objective"),
    "a backward hook that changes gradients": (
        "gradients", changing_backward_hook, r"layer 1 \(Tanh\)"
    ),
    "an infinite slope": ("gradients", infinite_slope, "not finite"),
    "unregistered layers": ("gradients", unregistered, "Register them"),
}  # fmt: skip
