"""An update of a player that refuses numbers that are not finite, and the curves of its losses."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lab import runs


class Losses(nn.Module):
    """Averages of losses over about the last ten pairs of updates: state, as parameters are."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.values: Tensor
        self.register_buffer("values", torch.full((len(names),), torch.nan))

    def add(self, *losses: Tensor) -> None:
        fresh = torch.stack([loss.detach().float() for loss in losses])
        self.values = torch.where(self.values.isnan(), fresh, 0.9 * self.values + 0.1 * fresh)

    def row(self) -> dict[str, float]:
        return dict(zip(self.names, self.values.tolist(), strict=True))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, who: str, checkpoint: Path) -> None:
    """Take a step of finite numbers, or stop before it reaches a checkpoint."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(loss + norm):
        found = f"the loss and its gradient must be finite, they are {loss.item():g} and {norm:g}"
        raise FloatingPointError(_stopped(f"{who}: {found}", checkpoint))
    optimizer.step()
    if not torch.isfinite(length := get_total_norm(parameters)):
        found = f"the step must leave the parameters finite, their norm is {length:g}"
        raise FloatingPointError(_stopped(f"{who}: {found}", checkpoint))


def _stopped(what: str, checkpoint: Path) -> str:
    kept = "none yet"
    if checkpoint.exists():
        log = runs.read_log(checkpoint)
        pair = log["since"][0] if "since" in log else log["history"][-1]["pairs"]
        kept = f"{checkpoint} is of pair {pair}"
    return (
        f"{what} (the last checkpoint: {kept}): lower the learning rates, or leave --amp, in "
        "another folder"
    )
