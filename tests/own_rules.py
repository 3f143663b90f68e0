"""Optimizers that torch does not have, with their registered rules, and lists of optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import unroll
from tests.players import LR, Build


class Own(torch.optim.Optimizer):
    """An optimizer whose step is a function over each param group, in place."""

    settings: dict[str, Any]

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, self.settings | settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.update(group, [p for p in group["params"] if p.grad is not None])

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        raise NotImplementedError


class Lion(Own):
    """Chen et al. (2023): the sign of an interpolated momentum, decoupled weight decay."""

    settings = {"lr": LR / 10, "betas": (0.9, 0.99), "weight_decay": 0.1}  # noqa: RUF012

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(group["lr"] * (beta1 * m + (1 - beta1) * p.grad).sign())
            m.mul_(beta2).add_((1 - beta2) * p.grad)


def lion(parameters: Any, gradients: Any, states: Any, group: Any) -> Any:
    beta1, beta2 = group["betas"]
    moved, new = [], []
    for p, g, s in zip(parameters, gradients, states, strict=True):
        m = s.get("exp_avg", torch.zeros_like(p))
        step = (beta1 * m + (1 - beta1) * g).sign()
        moved.append(p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * step)
        new.append({"exp_avg": beta2 * m + (1 - beta2) * g})
    return moved, new, group


class ScheduleFreeSGD(Own):
    """Defazio et al. (2024), in training mode: parameters are y, and z is in the state.

    The step count and the sum of the averaging weights are numbers of the param group.
    """

    settings = {"lr": 3 * LR, "momentum": 0.9, "weight_decay": 0.1, "k": 0, "weight_sum": 0.0}  # noqa: RUF012

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lr, weight = group["lr"], group["lr"] ** 2
        group["weight_sum"] += weight
        group["k"] += 1
        share = weight / group["weight_sum"]
        for p in parameters:
            z = self.state[p].setdefault("z", p.clone())
            g = p.grad + group["weight_decay"] * p
            p.lerp_(z, share)
            p.add_(g, alpha=lr * (group["momentum"] * (1 - share) - 1))
            z.sub_(g, alpha=lr)


def schedule_free_sgd(parameters: Any, gradients: Any, states: Any, group: Any) -> Any:
    lr, weight_sum = group["lr"], group["weight_sum"] + group["lr"] ** 2
    share = group["lr"] ** 2 / weight_sum
    moved, new = [], []
    for p, g, s in zip(parameters, gradients, states, strict=True):
        z = s.get("z", p)
        g = g + group["weight_decay"] * p
        y = p + share * (z - p) + lr * (group["momentum"] * (1 - share) - 1) * g
        moved.append(y)
        new.append({"z": z - lr * g})
    return moved, new, {**group, "weight_sum": weight_sum, "k": group["k"] + 1}


class Prodigy(Own):
    """After Mishchenko and Defazio (2024): sums over all parameters estimate the distance d.

    d and a running sum are numbers of the param group, which depend on the gradients.
    """

    settings = {"lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8, "d": 1e-3, "numerator": 0.0}  # noqa: RUF012

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        (beta1, beta2), d, lr = group["betas"], group["d"], group["lr"]
        numerator, denominator = beta2**0.5 * group["numerator"], 0.0
        for p in parameters:
            assert p.grad is not None
            s = self.state[p]
            if not s:
                s |= {"p0": p.clone(), **{k: torch.zeros_like(p) for k in ("m", "v", "s")}}
            numerator += (1 - beta2**0.5) * d * lr * float((p.grad * (s["p0"] - p)).sum())
            s["m"].mul_(beta1).add_(d * (1 - beta1) * p.grad)
            s["v"].mul_(beta2).add_(d * d * (1 - beta2) * p.grad**2)
            s["s"].mul_(beta2**0.5).add_((1 - beta2**0.5) * d * lr * p.grad)
            denominator += float(s["s"].abs().sum())
        group["numerator"] = numerator
        if parameters:
            group["d"] = d = max(d, numerator / denominator)
        for p in parameters:
            s = self.state[p]
            p.sub_(d * lr * s["m"] / (s["v"].sqrt() + d * group["eps"]))


def prodigy(parameters: Any, gradients: Any, states: Any, group: Any) -> Any:
    (beta1, beta2), d, lr = group["betas"], group["d"], group["lr"]
    numerator, denominator, new = beta2**0.5 * group["numerator"], torch.zeros(()), []
    for p, g, s in zip(parameters, gradients, states, strict=True):
        zeros = torch.zeros_like(p)
        last = s or {"p0": p, "m": zeros, "v": zeros, "s": zeros}
        numerator = numerator + (1 - beta2**0.5) * d * lr * (g * (last["p0"] - p)).sum()
        m = beta1 * last["m"] + d * (1 - beta1) * g
        v = beta2 * last["v"] + d * d * (1 - beta2) * g**2
        total = beta2**0.5 * last["s"] + (1 - beta2**0.5) * d * lr * g
        denominator = denominator + total.abs().sum()
        new.append({"p0": last["p0"], "m": m, "v": v, "s": total})
    if new:
        estimate = numerator / denominator
        d = torch.maximum(torch.as_tensor(d, dtype=estimate.dtype), estimate)
    moved = [
        p - d * lr * s["m"] / (s["v"].sqrt() + d * group["eps"])
        for p, s in zip(parameters, new, strict=True)
    ]
    return moved, new, {**group, "d": d, "numerator": numerator}


RULES = {Lion: lion, ScheduleFreeSGD: schedule_free_sgd, Prodigy: prodigy}
for cls, rule in RULES.items():
    unroll.register_rule(cls, rule)

OWN: dict[str, Build] = {
    "Lion": lambda d: Lion(d.parameters()),
    "ScheduleFreeSGD": lambda d: ScheduleFreeSGD(d.parameters()),
    "Prodigy": lambda d: Prodigy(d.parameters()),
}


def matrices(d: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that Muon takes."""
    return [p for p in d.parameters() if p.dim() == 2]


def others(d: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that Muon does not take."""
    return [p for p in d.parameters() if p.dim() != 2]


def with_muon(d: nn.Module, lr: float = LR, **settings: Any) -> list[Any]:
    """Return Muon for D's matrices beside AdamW for the rest, as far as D has such parameters."""
    optimizers: list[Any] = []
    if others(d):
        optimizers.append(torch.optim.AdamW(others(d), lr=lr))
    if matrices(d):
        optimizers.append(torch.optim.Muon(matrices(d), lr=lr, **settings))
    return optimizers


def in_turn(d: nn.Module) -> list[Any]:
    """Return optimizers for every second parameter of D and, if there are any, the rest."""
    halves = list(d.parameters())[::2], list(d.parameters())[1::2]
    first = torch.optim.AdamW(halves[0], lr=LR, weight_decay=0.1)
    return [first, torch.optim.SGD(halves[1], lr=LR, momentum=0.9)] if halves[1] else [first]


SEVERAL: dict[str, Build] = {"torch AdamW and SGD": in_turn}
MUON: dict[str, Build] = {}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    MUON["Muon"] = with_muon
    MUON["Muon match_rms_adamw"] = lambda d: with_muon(
        d, nesterov=False, adjust_lr_fn="match_rms_adamw"
    )
