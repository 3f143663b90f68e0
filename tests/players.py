"""Discriminators, every supported optimizer, and real training steps with them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torchopt
from torch import Tensor, nn

from tests.settings import DEVICE, randn
from unroll import Minimax, Objective, UnrolledGeneratorLoss

Build = Callable[[nn.Module], Any]

LR = 0.01  # larger ones amplify float32 round-off beyond what the tests allow
TORCH: dict[str, Build] = {
    "Adam": lambda d: torch.optim.Adam(d.parameters(), lr=LR),
    "Adam betas": lambda d: torch.optim.Adam(d.parameters(), lr=LR, betas=(0.5, 0.9)),
    "Adam eps": lambda d: torch.optim.Adam(d.parameters(), lr=LR, eps=1e-2),
    "Adam weight decay": lambda d: torch.optim.Adam(d.parameters(), lr=LR, weight_decay=0.1),
    "Adam amsgrad": lambda d: torch.optim.Adam(
        d.parameters(), lr=LR, amsgrad=True, betas=(0.5, 0.6)
    ),
    "Adam maximize": lambda d: torch.optim.Adam(
        d.parameters(), lr=LR, maximize=True, weight_decay=0.1
    ),
    "Adam decoupled": lambda d: torch.optim.Adam(
        d.parameters(), lr=LR, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "Adam foreach": lambda d: torch.optim.Adam(d.parameters(), lr=LR, foreach=True),
    "Adam fused": lambda d: torch.optim.Adam(d.parameters(), lr=LR, fused=True),
    "Adam for loop": lambda d: torch.optim.Adam(d.parameters(), lr=LR, foreach=False),
    "Adam tensor lr": lambda d: torch.optim.Adam(d.parameters(), lr=torch.tensor(LR)),
    "AdamW": lambda d: torch.optim.AdamW(d.parameters(), lr=LR, weight_decay=0.2),
    "AdamW amsgrad": lambda d: torch.optim.AdamW(
        d.parameters(), lr=LR, weight_decay=0.2, amsgrad=True, maximize=True, betas=(0.4, 0.5)
    ),
    "SGD": lambda d: torch.optim.SGD(d.parameters(), lr=LR),
    "SGD momentum": lambda d: torch.optim.SGD(d.parameters(), lr=LR, momentum=0.9),
    "SGD dampening": lambda d: torch.optim.SGD(d.parameters(), lr=LR, momentum=0.9, dampening=0.5),
    "SGD nesterov": lambda d: torch.optim.SGD(
        d.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "SGD weight decay": lambda d: torch.optim.SGD(d.parameters(), lr=LR, weight_decay=0.1),
    "SGD maximize": lambda d: torch.optim.SGD(
        d.parameters(), lr=LR, momentum=0.5, weight_decay=0.1, maximize=True
    ),
    "SGD foreach": lambda d: torch.optim.SGD(d.parameters(), lr=LR, momentum=0.9, foreach=True),
    "SGD fused": lambda d: torch.optim.SGD(d.parameters(), lr=LR, momentum=0.9, fused=True),
    "SGD tensor lr": lambda d: torch.optim.SGD(d.parameters(), lr=torch.tensor(LR), momentum=0.9),
    "NAdam": lambda d: torch.optim.NAdam(d.parameters(), lr=LR),
    "NAdam weight decay": lambda d: torch.optim.NAdam(
        d.parameters(), lr=LR, weight_decay=0.1, momentum_decay=0.1, betas=(0.5, 0.9)
    ),
    "NAdam decoupled": lambda d: torch.optim.NAdam(
        d.parameters(), lr=LR, weight_decay=0.2, decoupled_weight_decay=True, maximize=True
    ),
    "NAdam foreach": lambda d: torch.optim.NAdam(
        d.parameters(), lr=LR, foreach=True, weight_decay=0.1
    ),
    "NAdam tensor lr": lambda d: torch.optim.NAdam(d.parameters(), lr=torch.tensor(LR)),
    "RAdam": lambda d: torch.optim.RAdam(d.parameters(), lr=LR),
    "RAdam betas": lambda d: torch.optim.RAdam(
        d.parameters(), lr=LR, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1
    ),
    "RAdam decoupled": lambda d: torch.optim.RAdam(
        d.parameters(), lr=LR, weight_decay=0.2, decoupled_weight_decay=True, maximize=True
    ),
    "RAdam foreach": lambda d: torch.optim.RAdam(d.parameters(), lr=LR, foreach=True),
    "RAdam tensor lr": lambda d: torch.optim.RAdam(d.parameters(), lr=torch.tensor(LR)),
    "Adamax": lambda d: torch.optim.Adamax(d.parameters(), lr=LR),
    "Adamax weight decay": lambda d: torch.optim.Adamax(
        d.parameters(), lr=LR / 3, weight_decay=0.1, betas=(0.5, 0.7), eps=1e-3, maximize=True
    ),
    "Adamax foreach": lambda d: torch.optim.Adamax(d.parameters(), lr=LR, foreach=True),
    "Adamax tensor lr": lambda d: torch.optim.Adamax(d.parameters(), lr=torch.tensor(LR)),
    "RMSprop": lambda d: torch.optim.RMSprop(d.parameters(), lr=LR / 10),
    "RMSprop centered": lambda d: torch.optim.RMSprop(
        d.parameters(), lr=LR, centered=True, alpha=0.9, weight_decay=0.1
    ),
    "RMSprop momentum": lambda d: torch.optim.RMSprop(
        d.parameters(), lr=LR / 10, momentum=0.9, eps=1e-3, maximize=True
    ),
    "RMSprop foreach": lambda d: torch.optim.RMSprop(
        d.parameters(), lr=LR / 10, momentum=0.5, centered=True, alpha=0.9, foreach=True
    ),
    "RMSprop tensor lr": lambda d: torch.optim.RMSprop(d.parameters(), lr=torch.tensor(LR / 10)),
    "Adagrad": lambda d: torch.optim.Adagrad(d.parameters(), lr=LR),
    "Adagrad decays": lambda d: torch.optim.Adagrad(
        d.parameters(), lr=LR, lr_decay=0.3, weight_decay=0.1
    ),
    "Adagrad initial": lambda d: torch.optim.Adagrad(
        d.parameters(), lr=10 * LR, initial_accumulator_value=0.2, eps=1e-3, maximize=True
    ),
    "Adagrad foreach": lambda d: torch.optim.Adagrad(
        d.parameters(), lr=LR, lr_decay=0.3, foreach=True
    ),
    "Adagrad fused": lambda d: torch.optim.Adagrad(d.parameters(), lr=LR, fused=True),
    "Adagrad tensor lr": lambda d: torch.optim.Adagrad(d.parameters(), lr=torch.tensor(LR)),
    "Adadelta": lambda d: torch.optim.Adadelta(d.parameters()),
    "Adadelta weight decay": lambda d: torch.optim.Adadelta(
        d.parameters(), lr=3.0, rho=0.7, eps=1e-4, weight_decay=0.1, maximize=True
    ),
    "Adadelta foreach": lambda d: torch.optim.Adadelta(d.parameters(), foreach=True),
    "Adadelta tensor lr": lambda d: torch.optim.Adadelta(d.parameters(), lr=torch.tensor(1.5)),
    "ASGD": lambda d: torch.optim.ASGD(d.parameters(), lr=LR),
    "ASGD averaging": lambda d: torch.optim.ASGD(
        d.parameters(), lr=LR, lambd=0.1, alpha=0.5, t0=2, weight_decay=0.1, maximize=True
    ),
    "ASGD foreach": lambda d: torch.optim.ASGD(
        d.parameters(), lr=LR, lambd=0.1, t0=2, foreach=True
    ),
    "ASGD tensor lr": lambda d: torch.optim.ASGD(d.parameters(), lr=torch.tensor(LR), lambd=0.1),
    "Adafactor": lambda d: torch.optim.Adafactor(d.parameters(), lr=LR),
    "Adafactor settings": lambda d: torch.optim.Adafactor(
        d.parameters(), lr=5.0, beta2_decay=-0.5, eps=(1e-3, 1e-2), d=1.5, maximize=True
    ),
    "Adafactor weight decay": lambda d: torch.optim.Adafactor(
        d.parameters(), lr=LR, weight_decay=0.1, foreach=False
    ),
    "Adafactor foreach": lambda d: torch.optim.Adafactor(
        d.parameters(), lr=LR, weight_decay=0.1, foreach=True
    ),
    "Adafactor tensor lr": lambda d: torch.optim.Adafactor(d.parameters(), lr=torch.tensor(LR)),
    "Rprop": lambda d: torch.optim.Rprop(d.parameters(), lr=LR / 10),
    "Rprop settings": lambda d: torch.optim.Rprop(
        d.parameters(), lr=LR, etas=(0.3, 1.5), step_sizes=(1e-3, 2e-2), maximize=True
    ),
    "Rprop foreach": lambda d: torch.optim.Rprop(
        d.parameters(), lr=LR / 10, foreach=True, maximize=True
    ),
}
TORCHOPT: dict[str, Build] = {
    "torchopt.Adam": lambda d: torchopt.Adam(d.parameters(), lr=LR, weight_decay=0.1),
    "torchopt.AdamW": lambda d: torchopt.AdamW(d.parameters(), lr=LR, weight_decay=0.1),
    "torchopt.Adamax": lambda d: torchopt.Adamax(d.parameters(), lr=LR),
    "torchopt.RAdam": lambda d: torchopt.RAdam(d.parameters(), lr=LR),
    "torchopt.Adagrad": lambda d: torchopt.Adagrad(d.parameters(), lr=LR),
    "torchopt.Adadelta": lambda d: torchopt.Adadelta(d.parameters(), lr=1.0),
    "torchopt.RMSprop": lambda d: torchopt.RMSprop(d.parameters(), lr=LR),
    "torchopt.RMSprop centered": lambda d: torchopt.RMSprop(
        d.parameters(), lr=LR, centered=True, momentum=0.9
    ),
    "torchopt.SGD": lambda d: torchopt.SGD(d.parameters(), lr=LR),
    "torchopt.SGD momentum": lambda d: torchopt.SGD(d.parameters(), lr=LR, momentum=0.9),
    "torchopt.SGD dampening": lambda d: torchopt.SGD(
        d.parameters(), lr=LR, momentum=0.9, dampening=0.5
    ),
    "torchopt.SGD nesterov": lambda d: torchopt.SGD(
        d.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "torchopt.SGD maximize": lambda d: torchopt.SGD(
        d.parameters(), lr=LR, momentum=0.9, maximize=True
    ),
    "torchopt.Optimizer of a chain": lambda d: torchopt.Optimizer(d.parameters(), scheduled()),
    "torchopt.MetaAdam": lambda d: torchopt.MetaAdam(d, lr=LR),
    "torchopt.MetaSGD": lambda d: torchopt.MetaSGD(d, lr=LR, momentum=0.9, dampening=0.5),
    "torchopt.MetaRMSProp": lambda d: torchopt.MetaRMSProp(d, lr=LR),
    "torchopt.FuncOptimizer": lambda _: torchopt.FuncOptimizer(torchopt.adam(LR)),
}
OPTIMIZERS = TORCH | TORCHOPT


def scheduled() -> Any:
    """Return a chain with momentum and a learning rate that falls from step to step."""
    schedule = torchopt.schedule.linear_schedule(LR, LR / 10, 60, 0)
    return torchopt.chain(torchopt.sgd(1.0, momentum=0.5), torchopt.sgd(schedule, maximize=True))


def deep(dtype: torch.dtype = torch.float64, layers: int = 16) -> nn.Module:
    """Return a D of so many layers that the order of names ("10." < "2.") is not theirs."""
    blocks = [nn.Tanh() if i % 4 == 3 else nn.Linear(4, 4) for i in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(4, 1)).to(DEVICE, dtype)


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a D with buffers that a forward pass changes."""
    hidden = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(6, 1)).to(DEVICE, dtype)


def batches(
    count: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Return (fake, real) pairs, the same ones at every call and apart from the global RNG."""
    source = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, 2, 5, 4, generator=source, dtype=torch.float64)
    return [(fake, real + 0.5) for fake, real in draw.to(DEVICE, dtype)]


def step(d: nn.Module, optimizer: Any, loss: Tensor) -> None:
    """Take one real training step, as each kind of optimizer asks for it."""
    if isinstance(optimizer, torchopt.MetaOptimizer):
        optimizer.step(loss)
        torchopt.stop_gradient(d)
        torchopt.stop_gradient(optimizer)
    elif isinstance(optimizer, torchopt.FuncOptimizer):
        parameters = tuple(d.parameters())
        moved = optimizer.step(loss, parameters)
        state: Any = optimizer.optim_state
        optimizer.optim_state = torchopt.pytree.tree_map(_detached, state)
        with torch.no_grad():
            for parameter, value in zip(parameters, moved, strict=True):
                parameter.copy_(value)
    elif isinstance(optimizer, list):
        for one in optimizer:
            one.zero_grad()
        torch.autograd.backward(loss)
        for one in optimizer:
            one.step()
    else:
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def train(
    d: nn.Module,
    optimizer: Any,
    pairs: list[tuple[Any, Any]],
    objective: Objective = Minimax(),
) -> None:
    """Take one real step of D on each (fake, real) pair."""
    for fake, real in pairs:
        step(d, optimizer, objective.discriminator_loss(called(d), fake, real))


def called(d: nn.Module) -> Callable[[Any], Any]:
    """Return D as objectives call it: with a tensor, a tuple or a mapping."""

    def call(batch: Any) -> Any:
        if isinstance(batch, dict):
            return d(**batch)
        return d(*batch) if isinstance(batch, tuple) else d(batch)

    return call


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def with_options(loss: UnrolledGeneratorLoss, **options: Any) -> UnrolledGeneratorLoss:
    """Return a loss of the same D, optimizer and objective with other options."""
    names = (
        *("unroll_steps", "stop_gradient", "average", "checkpoint"),
        *("transform_gradients", "project", "sync"),
    )
    settings = {name: getattr(loss, name) for name in names} | options
    return UnrolledGeneratorLoss(loss.discriminator, loss.optimizer, loss.objective, **settings)


def tanh_net() -> nn.Sequential:
    """Return a smooth D of three numbers."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DEVICE).double()


def fakes() -> Tensor:
    """Return a batch for that D, of the global RNG, which requires a gradient."""
    return randn(5, 3).requires_grad_()


def assert_live(loss: UnrolledGeneratorLoss) -> None:
    """Compare the look-ahead with as many real steps of the real D."""
    fake, real, d = randn(5, 3), randn(5, 3), loss.discriminator
    ahead = loss.unroll(fake, real)
    before = copy.deepcopy(d.state_dict())
    train(d, loss.optimizer, [(fake, real)] * loss.unroll_steps, loss.objective)
    moved = 0
    for name, p in d.named_parameters():
        torch.testing.assert_close(ahead.parameters[name], p.detach(), rtol=1e-9, atol=1e-12)
        moved += not torch.equal(p.detach(), before[name])
    assert moved == sum(1 for _ in d.parameters())
