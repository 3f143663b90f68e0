"""Small games: a generator, a discriminator, batches, and every optimizer and objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector
from torchopt.base import GradientTransformation

import unroll
from tests.settings import DEVICE, randn


class Squared:
    """A user's own game: two methods, no base class; the generator sees the real data too."""

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        real_loss: Tensor = (discriminator(real).tanh() - 0.5).square().mean()
        fake_loss: Tensor = discriminator(fake).sin().square().mean()
        return real_loss + fake_loss

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        difference: Tensor = discriminator(fake).mean() - discriminator(real).mean()
        return difference.square()


OBJECTIVES: dict[str, Any] = {
    "minimax": unroll.Minimax(),
    "non_saturating": unroll.NonSaturating(),
    "least_squares": unroll.LeastSquares(),
    "hinge": unroll.Hinge(),
    "wasserstein": unroll.Wasserstein(),
    "pairing": unroll.RelativisticPairing(),
    "average": unroll.RelativisticAverage(),
    "bce": unroll.Criterion(nn.BCEWithLogitsLoss(), real_label=0.9, fake_label=0.1, weight=0.5),
    "mse": unroll.Criterion(nn.MSELoss()),
    "minimax+r1": unroll.Minimax() + unroll.R1(0.7),
    "non_saturating+r2": unroll.NonSaturating() + unroll.R2(0.7),
    "pairing+r1+r2": unroll.RelativisticPairing() + unroll.R1(0.5) + unroll.R2(0.8),
    "wasserstein+gp": unroll.Wasserstein() + unroll.GradientPenalty(1.5),
    "own": Squared(),
    "own+r1": Squared() + unroll.R1(0.7),
}


def _schedule() -> Callable[[Any], Any]:
    schedule: Callable[[Any], Any] = torchopt.schedule.linear_schedule(0.1, 0.02, 4, 0)
    return schedule


# name -> what trains D, given D
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda _: torchopt.sgd(0.3),
    "sgd momentum": lambda _: torchopt.sgd(0.2, momentum=0.8),
    "sgd dampening": lambda _: torchopt.sgd(0.2, momentum=0.8, dampening=0.3),
    "sgd nesterov": lambda _: torchopt.sgd(0.2, momentum=0.8, nesterov=True),
    "sgd decay": lambda _: torchopt.sgd(0.2, weight_decay=0.1),
    "sgd maximize": lambda _: torchopt.sgd(0.1, momentum=0.5, maximize=True),
    "sgd schedule": lambda _: torchopt.sgd(_schedule()),
    "adam": lambda _: torchopt.adam(0.05),
    "adam betas": lambda _: torchopt.adam(0.1, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
    "adam schedule": lambda _: torchopt.adam(_schedule(), betas=(0.0, 0.99)),
    "adam eps_root": lambda _: torchopt.adam(0.05, eps_root=1e-6),
    "adam maximize": lambda _: torchopt.adam(0.05, maximize=True),
    "adamw": lambda _: torchopt.adamw(0.05, weight_decay=0.1),
    "adamax": lambda _: torchopt.adamax(0.05),
    "radam": lambda _: torchopt.radam(0.05),
    "rmsprop": lambda _: torchopt.rmsprop(0.02),
    "rmsprop centered": lambda _: torchopt.rmsprop(0.02, alpha=0.9, centered=True),
    "rmsprop momentum": lambda _: torchopt.rmsprop(0.02, momentum=0.7, nesterov=True),
    "adagrad": lambda _: torchopt.adagrad(0.05, lr_decay=0.1, weight_decay=0.01),
    "adadelta": lambda _: torchopt.adadelta(10.0),
    "chain decay": lambda _: torchopt.chain(
        torchopt.transform.add_decayed_weights(0.1), torchopt.sgd(0.2, momentum=0.5)
    ),
    "chain scale": lambda _: torchopt.chain(
        torchopt.transform.nan_to_num(0.0), torchopt.adam(0.1), torchopt.transform.scale(0.5)
    ),
    "Optimizer SGD": lambda d: torchopt.SGD(d.parameters(), 0.2, momentum=0.8, nesterov=True),
    "Optimizer Adam": lambda d: torchopt.Adam(d.parameters(), 0.05),
    "Optimizer AdamW": lambda d: torchopt.AdamW(d.parameters(), 0.05, weight_decay=0.1),
    "Optimizer RMSProp": lambda d: torchopt.RMSProp(d.parameters(), 0.02),
    "Optimizer Adagrad": lambda d: torchopt.Adagrad(d.parameters(), 0.05),
    "MetaSGD": lambda d: torchopt.MetaSGD(d, 0.2, momentum=0.8),
    "MetaAdam": lambda d: torchopt.MetaAdam(d, 0.05, betas=(0.5, 0.99)),
    "FuncOptimizer adam": lambda _: torchopt.FuncOptimizer(torchopt.adam(0.05)),
    "FuncOptimizer sgd": lambda _: torchopt.FuncOptimizer(torchopt.sgd(0.2, momentum=0.8)),
    "torch SGD": lambda d: torch.optim.SGD(d.parameters(), 0.3),
    "torch SGD momentum": lambda d: torch.optim.SGD(
        d.parameters(), 0.2, momentum=0.8, dampening=0.3, weight_decay=0.1
    ),
    "torch SGD nesterov": lambda d: torch.optim.SGD(
        d.parameters(), 0.2, momentum=0.8, nesterov=True
    ),
    "torch SGD maximize": lambda d: torch.optim.SGD(
        d.parameters(), 0.1, momentum=0.5, maximize=True
    ),
    "torch Adam": lambda d: torch.optim.Adam(d.parameters(), 0.05),
    "torch Adam decay": lambda d: torch.optim.Adam(
        d.parameters(), 0.1, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1
    ),
    "torch Adam maximize": lambda d: torch.optim.Adam(d.parameters(), 0.05, maximize=True),
    "torch Adam groups": lambda d: torch.optim.Adam(
        [{"params": [p], "lr": 0.05 / (i + 1)} for i, p in enumerate(d.parameters())],
        betas=(0.5, 0.999),
    ),
    "torch AdamW": lambda d: torch.optim.AdamW(d.parameters(), 0.05, weight_decay=0.1),
    "torch amsgrad": lambda d: torch.optim.Adam(
        d.parameters(), 0.05, betas=(0.9, 0.5), amsgrad=True
    ),
    "torch NAdam": lambda d: torch.optim.NAdam(d.parameters(), 0.05, weight_decay=0.1),
    "torch NAdam decoupled": lambda d: torch.optim.NAdam(
        d.parameters(),
        0.05,
        betas=(0.5, 0.9),
        weight_decay=0.1,
        decoupled_weight_decay=True,
        momentum_decay=0.1,
        maximize=True,
    ),
    "torch RAdam": lambda d: torch.optim.RAdam(d.parameters(), 0.05, weight_decay=0.1),
    "torch RAdam decoupled": lambda d: torch.optim.RAdam(
        d.parameters(), 0.05, betas=(0.5, 0.9), weight_decay=0.1, decoupled_weight_decay=True
    ),
    "torch Adamax": lambda d: torch.optim.Adamax(d.parameters(), 0.05, weight_decay=0.1),
    "torch RMSprop": lambda d: torch.optim.RMSprop(d.parameters(), 0.02, weight_decay=0.1),
    "torch RMSprop centered": lambda d: torch.optim.RMSprop(
        d.parameters(), 0.02, alpha=0.9, centered=True
    ),
    "torch RMSprop momentum": lambda d: torch.optim.RMSprop(
        d.parameters(), 0.02, alpha=0.9, eps=1e-3, momentum=0.7, centered=True, maximize=True
    ),
    "torch Adagrad": lambda d: torch.optim.Adagrad(
        d.parameters(), 0.05, lr_decay=0.1, weight_decay=0.01
    ),
    "torch Adagrad initial": lambda d: torch.optim.Adagrad(
        d.parameters(), 0.3, initial_accumulator_value=0.1
    ),
    "torch Adadelta": lambda d: torch.optim.Adadelta(d.parameters(), 10.0, weight_decay=0.01),
    "torch ASGD": lambda d: torch.optim.ASGD(
        d.parameters(), 0.3, lambd=0.1, alpha=0.5, t0=1, weight_decay=0.1
    ),
    "torch Adafactor": lambda d: torch.optim.Adafactor(d.parameters(), 0.05, weight_decay=0.1),
    "torch Rprop": lambda d: torch.optim.Rprop(d.parameters(), 0.05, etas=(0.4, 1.3)),
}


def tanh_discriminator() -> nn.Module:
    """Return a smooth discriminator on the plane."""
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))


def normalised_discriminator() -> nn.Module:
    """Return a discriminator whose layers have awkward second derivatives."""
    return nn.Sequential(
        nn.Linear(2, 5), nn.LayerNorm(5), nn.SiLU(), nn.Linear(5, 4), nn.LeakyReLU(0.2),
        nn.Linear(4, 1),
    )  # fmt: skip


def convolutional_discriminator() -> nn.Module:
    """Return a discriminator that takes the two coordinates for a picture."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)), nn.Conv2d(1, 3, 3, padding=1), nn.ELU(), nn.Flatten(),
        nn.Linear(6, 1),
    )  # fmt: skip


class Game:
    """A generator and a discriminator in float64, with fresh noise and data for ``steps`` steps."""

    def __init__(
        self,
        seed: int = 0,
        discriminator: Callable[[], nn.Module] = tanh_discriminator,
        *,
        steps: int = 5,
        batch: int = 6,
    ) -> None:
        torch.manual_seed(seed)
        generator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.generator = generator.to(DEVICE, torch.float64)
        self.discriminator = discriminator().to(DEVICE, torch.float64)
        self.noise = randn(steps + 1, batch, 3)
        self.real = list(0.5 * randn(steps + 1, batch, 2) + 1.0)
        self.theta = parameters_to_vector(self.generator.parameters()).detach()

    def fake(self, theta: Tensor, k: int = 0) -> Tensor:
        """Return the k-th fakes of the generator whose parameters are the vector ``theta``."""
        parameters = dict(self.generator.named_parameters())
        parts = torch.split(theta, [p.numel() for p in parameters.values()])
        shaped = {
            name: part.view(p.shape)
            for part, (name, p) in zip(parts, parameters.items(), strict=True)
        }
        fake: Tensor = functional_call(self.generator, shaped, self.noise[k])
        return fake

    def minibatches(self, theta: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield re-sampled (fake_k, real_k)."""
        for k in range(1, steps + 1):
            yield self.fake(theta, k), self.real[k]

    def warmed(self, optimizer: Any, steps: int) -> dict[str, Any]:
        """Take real steps of D and return the keyword arguments that carry a bare state."""
        d, objective = self.discriminator, unroll.Minimax()
        bare = isinstance(optimizer, GradientTransformation)
        state: Any = optimizer.init(tuple(d.parameters())) if bare else None
        for k in range(steps):
            fake = self.fake(self.theta, k % len(self.real))
            loss = objective.discriminator_loss(d, fake, self.real[-1 - k % len(self.real)])
            theta = tuple(d.parameters())
            if bare:
                gradients = torch.autograd.grad(loss, theta, allow_unused=True)
                updates, state = optimizer.update(gradients, state, params=theta, inplace=False)
                _assign(theta, torchopt.apply_updates(theta, updates, inplace=False))
            elif isinstance(optimizer, torchopt.FuncOptimizer):
                _assign(theta, optimizer.step(loss, theta))
            elif isinstance(optimizer, torchopt.MetaOptimizer):
                optimizer.step(loss)
                torchopt.stop_gradient(optimizer)
                torchopt.stop_gradient(d)
            else:
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return {"optimizer_state": state} if bare and steps else {}


def _assign(theta: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        for p, value in zip(theta, values, strict=True):
            p.copy_(value)
