"""Update equations over the parameters of one param group at once: what users register, too.

A rule maps lists of parameters, of their gradients and of their states (empty before the first
step), and the param group, to new parameters, new states and the new group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unroll._autograd_fixes import safe_sqrt

State = Mapping[str, Any]
Updated = tuple[Sequence[Tensor], Sequence[State], State]
GroupRule = Callable[[list[Tensor], list[Tensor], list[dict[str, Any]], dict[str, Any]], Updated]


def adafactor(p: Tensor, g: Tensor, s: State, h: State) -> tuple[Tensor, State]:
    """Adafactor (Shazeer and Stern 2018), with torch's relative step."""
    g = -g if h["maximize"] else g
    eps1, eps2 = h["eps"]
    eps1 = torch.finfo(h["dtype"]).eps if eps1 is None else eps1
    t = float(s.get("step", 0.0)) + 1
    weight = t ** h["beta2_decay"]

    def average(key: str, new: Tensor) -> Tensor:
        last: Tensor = s[key] if s else torch.zeros_like(new)
        return last.lerp(new, weight)

    if g.dim() > 1:
        row = average("row_var", (g * g).mean(-1, keepdim=True))
        column = average("col_var", (g * g).mean(-2, keepdim=True))
        state = {"step": t, "row_var": row, "col_var": column}
        v = row @ column / row.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        v = average("variance", g * g)
        state = {"step": t, "variance": v}
    update = g * v.clamp(min=eps1 * eps1).rsqrt()
    rate = min(h["lr"], 1 / t**0.5)
    scale, limit = _rms(p).clamp(min=eps2), (_rms(update) / h["d"]).clamp(min=1.0)
    if isinstance(rate, Tensor):  # whose precision decides: torch has Python floats beside it
        scale, limit = scale.to(rate.dtype), limit.to(rate.dtype)
    return p * (1 - h["lr"] * h["weight_decay"]) - rate * scale / limit * update, state


MUON_DTYPE = torch.bfloat16  # in which torch orthogonalises


def muon(p: Tensor, g: Tensor, s: State, h: State) -> tuple[Tensor, State]:
    """Muon (Jordan 2024): its value is that of bfloat16, its derivative that without rounding."""
    lr, momentum = h["lr"], h["momentum"]
    buffer = (s["momentum_buffer"] if s else torch.zeros_like(g)).lerp(g, 1 - momentum)
    update = g.lerp(buffer, momentum) if h["nesterov"] else buffer
    exact = _orthogonal(update, h, torch.promote_types(update.dtype, torch.float32))
    # The first term is zero and carries the derivative; the sum is the rounded one bit for bit.
    step = exact - exact.detach() + _orthogonal(update.detach(), h, MUON_DTYPE)
    rows, columns = p.shape
    ratio = {
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral_unclamped": (rows / columns) ** 0.5,
    }.get(h["adjust_lr_fn"], max(1.0, rows / columns) ** 0.5)
    p = p * (1 - lr * h["weight_decay"])
    return p - (lr * ratio * step).to(p.dtype), {"momentum_buffer": buffer}


def _orthogonal(m: Tensor, h: State, dtype: torch.dtype) -> Tensor:
    """Return what Newton-Schulz steps in a precision make of a matrix."""
    a, b, c = h["ns_coefficients"]
    tall = m.shape[0] > m.shape[1]
    x = (m.T if tall else m).to(dtype)
    x = x / x.norm().clamp(min=h["eps"])
    for _ in range(h["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _rms(t: Tensor) -> Tensor:
    return safe_sqrt(t.square().mean(dtype=torch.promote_types(t.dtype, torch.float32)))


def _each(rule: Callable[[Tensor, Tensor, State, State], tuple[Tensor, State]]) -> GroupRule:
    """Return the rule of a group whose parameters do not depend on each other."""

    def group_rule(
        parameters: list[Tensor], gradients: list[Tensor], states: list[Any], group: dict[str, Any]
    ) -> Updated:
        h = {k: v.reshape(()) if isinstance(v, Tensor) else v for k, v in group.items()}
        if parameters:
            h["dtype"] = parameters[0].dtype  # torch takes Adafactor's eps of the first one
        triples = zip(parameters, gradients, states, strict=True)
        found = [rule(p, g, s, h) for p, g, s in triples]
        return [p for p, _ in found], [s for _, s in found], group

    return group_rule


GROUP_RULES: dict[type[torch.optim.Optimizer], GroupRule] = {
    torch.optim.Adafactor: _each(adafactor)
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    GROUP_RULES[torch.optim.Muon] = _each(muon)
