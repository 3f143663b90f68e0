"""The update equations of ``torch.optim``, written so that they can be differentiated.

Each rule maps one parameter ``p``, its gradient ``g``, the optimizer's state ``s`` for it and its
param group's hyper-parameters ``h`` to the new parameter and state, without changing any of them.
All rules work element by element. Step counts are Python floats, so that bias corrections have
double precision, as in the plain optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unroll.derivatives import safe_sqrt

State = dict[str, Any]
Rule = Callable[[Tensor, Tensor, State, Mapping[str, Any]], tuple[Tensor, State]]


def adam(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> tuple[Tensor, State]:
    """Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) and AMSGrad."""
    (beta1, beta2), lr, weight_decay = h["betas"], h["lr"], h["weight_decay"]
    step = s.get("step", 0.0) + 1.0
    g = -g if h["maximize"] else g
    if weight_decay and h["decoupled_weight_decay"]:
        p = p * (1 - lr * weight_decay)
    elif weight_decay:
        g = g + weight_decay * p
    m = beta1 * s["exp_avg"] + (1 - beta1) * g if s else (1 - beta1) * g
    v = beta2 * s["exp_avg_sq"] + (1 - beta2) * g * g if s else (1 - beta2) * g * g
    state = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    if h["amsgrad"]:
        v = torch.maximum(s["max_exp_avg_sq"], v) if s else v
        state["max_exp_avg_sq"] = v
    denominator = safe_sqrt(v) / (1 - beta2**step) ** 0.5 + h["eps"]
    return p - lr / (1 - beta1**step) * m / denominator, state


def sgd(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> tuple[Tensor, State]:
    """Stochastic gradient descent with momentum, dampening, Nesterov's form and weight decay."""
    momentum, state = h["momentum"], s
    g = -g if h["maximize"] else g
    if h["weight_decay"]:
        g = g + h["weight_decay"] * p
    if momentum:
        last = s.get("momentum_buffer")
        buffer = g if last is None else momentum * last + (1 - h["dampening"]) * g
        state = {"momentum_buffer": buffer}
        g = g + momentum * buffer if h["nesterov"] else buffer
    return p - h["lr"] * g, state


RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.SGD: sgd,
}
