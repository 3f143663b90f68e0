"""The update equations of ``torch.optim``, in a form that can be differentiated.

A rule maps a parameter ``p``, its gradient ``g``, the optimizer's state ``s`` for it (empty before
the first step) and its param group's hyper-parameters ``h`` to the new parameter and state, without
changing any of them. Rules work element by element, so they run on flat vectors of many
parameters. What is one number for all elements (a step count, a product of momenta) is a Python
float, so that bias corrections have double precision, as in the plain optimizer; those numbers that
torch keeps in lower precision are rounded to it, ``h["scalar_dtype"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unroll._autograd_fixes import safe_sqrt

State = dict[str, Any]
Hyper = Mapping[str, Any]
Rule = Callable[[Tensor, Tensor, State, Hyper], tuple[Tensor, State]]


def adadelta(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """Adadelta (Zeiler 2012)."""
    g = _descent(p, g, h)
    v = _average(s.get("square_avg"), g * g, h["rho"])
    u = s["acc_delta"] if s else torch.zeros_like(v)
    delta = safe_sqrt(u + h["eps"]) / safe_sqrt(v + h["eps"]) * g
    acc_delta = _average(u, delta * delta, h["rho"])
    return p - h["lr"] * delta, _counted(s, square_avg=v, acc_delta=acc_delta)


def adagrad(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """Adagrad (Duchi, Hazan and Singer 2011)."""
    g = _descent(p, g, h)
    total = (s["sum"] if s else h["initial_accumulator_value"]) + g * g
    lr = h["lr"] / (1 + s.get("step", 0.0) * h["lr_decay"])
    return p - lr * g / (safe_sqrt(total) + h["eps"]), _counted(s, sum=total)


def adam(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) and AMSGrad."""
    (beta1, beta2), lr = h["betas"], h["lr"]
    p, g = _decayed(p, h), _descent(p, g, h)
    m = _average(s.get("exp_avg"), g, beta1)
    v = _average(s.get("exp_avg_sq"), g * g, beta2)
    state = _counted(s, exp_avg=m, exp_avg_sq=v)
    if h["amsgrad"]:
        v = torch.maximum(s["max_exp_avg_sq"], v) if s else v
        state["max_exp_avg_sq"] = v
    t = state["step"]
    denominator = safe_sqrt(v) / (1 - _power(beta2, t)) ** 0.5 + h["eps"]
    return p - lr / (1 - _power(beta1, t)) * m / denominator, state


def adamax(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """Adamax (Kingma and Ba 2015), with torch's ``eps`` inside the maximum."""
    beta1, beta2 = h["betas"]
    g = _descent(p, g, h)
    m = _average(s.get("exp_avg"), g, beta1)
    u = g.abs() + h["eps"]
    if "exp_inf" in s:
        u = torch.maximum(beta2 * s["exp_inf"], u)
    state = _counted(s, exp_avg=m, exp_inf=u)
    return p - h["lr"] / (1 - _power(beta1, state["step"])) * m / u, state


def asgd(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """Averaged stochastic gradient descent (Polyak and Juditsky 1992)."""
    lr, lambd, dtype = h["lr"], h["lambd"], h["scalar_dtype"]
    g = _descent(p, g, h)
    eta, mu = s.get("eta", _kept(_rounded(lr, dtype), lr, [lr])), s.get("mu", 1.0)
    p = p * (1 - lambd * eta) - eta * g
    state = _counted(s, ax=p if mu == 1 else s["ax"] + mu * (p - s["ax"]))
    t, default = state["step"], torch.get_default_dtype()
    foreach_t = torch.tensor(t, dtype=default) if h["foreach"] else t
    eta = lr / (1 + lambd * lr * foreach_t) ** h["alpha"]
    state["eta"] = _kept(_rounded(eta, default, dtype), eta, [lr, lambd, h["alpha"]])
    state["mu"] = _rounded(1 / max(1.0, t - h["t0"]), default, dtype)
    return p, state


def nadam(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """NAdam (Dozat 2016), and with decoupled weight decay NAdamW."""
    (beta1, beta2), lr = h["betas"], h["lr"]
    p, g = _decayed(p, h), _descent(p, g, h)
    m = _average(s.get("exp_avg"), g, beta1)
    v = _average(s.get("exp_avg_sq"), g * g, beta2)
    state = _counted(s, exp_avg=m, exp_avg_sq=v)
    t = state["step"]
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (i * h["momentum_decay"])) for i in (t, t + 1))
    last = s.get("mu_product", 1.0)
    rounded = torch.tensor(_item(last), dtype=h["scalar_dtype"]) * _item(mu)
    product = _kept(rounded.item(), last * mu, [beta1, h["momentum_decay"]])
    state["mu_product"] = product
    denominator = safe_sqrt(v) / (1 - beta2**t) ** 0.5 + h["eps"]
    ahead = lr * mu_next / (1 - product * mu_next) * m + lr * (1 - mu) / (1 - product) * g
    return p - ahead / denominator, state


def radam(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """RAdam (Liu et al. 2020): Adam once the variance of its step is tractable."""
    beta1, beta2 = h["betas"]
    p, g = _decayed(p, h), _descent(p, g, h)
    m = _average(s.get("exp_avg"), g, beta1)
    v = _average(s.get("exp_avg_sq"), g * g, beta2)
    state = _counted(s, exp_avg=m, exp_avg_sq=v)
    t = state["step"]
    step = h["lr"] * m / (1 - beta1**t)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)  # of the average, in samples
    if length > 5:
        rectified = (length - 4) * (length - 2) * longest
        rectified /= (longest - 4) * (longest - 2) * length
        step = step * (rectified * (1 - beta2**t)) ** 0.5 / (safe_sqrt(v) + h["eps"])
    return p - step, state


def rmsprop(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """RMSprop (Tieleman and Hinton 2012), also centred (Graves 2013), with momentum."""
    alpha = h["alpha"]
    g = _descent(p, g, h)
    v = _average(s.get("square_avg"), g * g, alpha)
    state = _counted(s, square_avg=v)
    if h["centered"]:
        mean = state["grad_avg"] = _average(s.get("grad_avg"), g, alpha)
        v = v - mean * mean
    step = g / (safe_sqrt(v) + h["eps"])
    if h["momentum"] != 0:
        step = state["momentum_buffer"] = step + h["momentum"] * s.get("momentum_buffer", 0.0)
    return p - h["lr"] * step, state


def rprop(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """Rprop (Riedmiller and Braun 1993): steps depend on signs, so their derivative is zero."""
    (shrink, grow), (smallest, largest) = h["etas"], h["step_sizes"]
    g = _descent(p, g, h)
    last, size = (s["prev"], s["step_size"]) if s else (torch.zeros_like(g), h["lr"])
    agreement = g * last
    factor = torch.ones_like(g).masked_fill(agreement > 0, grow).masked_fill(agreement < 0, shrink)
    size = (size * factor).clamp(smallest, largest)
    g = g.masked_fill(agreement < 0, 0.0)
    return p - g.sign() * size, _counted(s, prev=g, step_size=size)


def sgd(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """Stochastic gradient descent with momentum, dampening, Nesterov's form and weight decay."""
    momentum, state = h["momentum"], s
    g = _descent(p, g, h)
    if momentum != 0:
        last = s.get("momentum_buffer")
        buffer = g if last is None else momentum * last + (1 - h["dampening"]) * g
        state = {"momentum_buffer": buffer}
        g = g + momentum * buffer if h["nesterov"] else buffer
    return p - h["lr"] * g, state


RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.Adamax: adamax,
    torch.optim.SGD: sgd,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adagrad: adagrad,
    torch.optim.Adadelta: adadelta,
    torch.optim.ASGD: asgd,
    torch.optim.Rprop: rprop,
}

BRANCHING = (asgd, nadam, radam)  # on numbers that change from step to step


def _descent(p: Tensor, g: Tensor, h: Hyper) -> Tensor:
    """Return the gradient to descend, with that of weight decay where it is a penalty (L2)."""
    g = -g if h["maximize"] else g
    weight_decay = 0.0 if h.get("decoupled_weight_decay") else h.get("weight_decay", 0.0)
    return g + weight_decay * p if weight_decay != 0 else g


def _decayed(p: Tensor, h: Hyper) -> Tensor:
    """Return the parameter after decoupled weight decay."""
    decoupled = h["decoupled_weight_decay"] and h["weight_decay"] != 0
    return p * (1 - h["lr"] * h["weight_decay"]) if decoupled else p


def _power(base: Any, exponent: Any) -> Any:
    """Return a power. Of a number that varies, torch.compile cannot take it to that of a tensor."""
    if isinstance(exponent, Tensor):
        base = base * torch.ones_like(exponent)
    return base**exponent


def _average(last: Tensor | None, new: Tensor, beta: float) -> Tensor:
    """Return a moving average, which starts from zero."""
    return (1 - beta) * new if last is None else beta * last + (1 - beta) * new


def _counted(s: State, **entries: Any) -> State:
    return {"step": s.get("step", 0.0) + 1.0, **entries}


def _rounded(value: Any, *dtypes: torch.dtype) -> float:
    """Return a number as torch keeps it, in the precision of these types."""
    number = _item(value)
    for dtype in dtypes:
        number = torch.tensor(number, dtype=dtype).item()
    return number


def _item(value: Any) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _kept(number: float, value: Any, settings: Sequence[Any]) -> Any:
    """Return a number; where settings are differentiated, with the derivative of ``value``."""
    if not any(isinstance(s, Tensor) and s.requires_grad for s in settings):
        return number
    return (value - value.detach()).cpu().double() + number  # on a CPU, as not all have double
