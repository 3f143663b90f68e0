"""Central differences of a function, each with an uncertainty of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from unroll._diagnostics.report import Report

TOLERANCE = 1e-5  # of check_gradients; a lost second derivative is seldom below 1e-4
RATIO = 10**0.5
STEPS = [10**-3 / RATIO**i for i in range(13)]  # relative to the size of what is perturbed
EPS = torch.finfo(torch.float64).eps
ROUNDED = (
    "the gradient is too small beside the round-off of f_K to be checked, as where D is saturated "
    "or hardly heeds its input. Check with another discriminator"
)
COARSE = (
    "f_K bends or has kinks within the larger steps of the difference, and its round-off hides the "
    "slope in the smaller ones, so that none can tell. A fresh Adam's first step is nearly the "
    "sign of the gradient: check after some steps of D's optimizer, or on a copy with a larger eps"
)


class Line:
    """A function of tensors along a direction, by default a random one."""

    def __init__(
        self,
        function: Callable[[], Tensor],
        points: Sequence[Tensor],
        directions: Sequence[Tensor] | None = None,
    ) -> None:
        self.function, self.points = function, points
        value = function()
        self.middle, self.gradients = value.item(), gradients_of(value, points)
        noise = [EPS * abs(self.middle)]
        for _ in range(3):  # Round-off: how far it moves when its inputs do in their last digits.
            self.directions: Sequence[Tensor] = [
                torch.randn_like(p) * (p.detach().square().mean().sqrt() or 1.0) for p in points
            ]
            noise.append(abs(self.value(2 * EPS) - self.middle))
        self.noise = 2 * max(noise)
        self.directions = directions or self.directions

    def value(self, t: float) -> float:
        """Return the function at ``t``."""
        with self.at(t):
            return self.function().item()

    def slope(self, t: float) -> float:
        """Return autograd's slope at ``t``."""
        with self.at(t):
            return self.products(gradients_of(self.function(), self.points)).sum().item()

    def products(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the summands of a slope."""
        pairs = zip(gradients, self.directions, strict=True)
        return torch.cat([(g * d).flatten() for g, d in pairs])

    @contextmanager
    def at(self, t: float) -> Iterator[None]:
        """Move to ``t`` and back."""
        saved = [p.detach().clone() for p in self.points]
        for p, d in zip(self.points, self.directions, strict=True):
            p.data.add_(d, alpha=t)
        yield
        for p, s in zip(self.points, saved, strict=True):
            p.data.copy_(s)


def gradients_of(
    value: Tensor, points: Sequence[Tensor], *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return gradients, zeros where there is none."""
    return torch.autograd.grad(
        value, points, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def compare(line: Line, size: float = 0.0) -> Report:
    """Compare a slope with central differences, each of which has an uncertainty.

    That is its change since the last step (truncation), what one-sided differences differ by beyond
    a smooth function's curvature (a kink), and round-off. A slope is right where a certain
    difference agrees, also one without its truncation, wrong where none does and it is steady over
    the best one's interval. Errors are relative to ``size``, or to what the slope would be with
    random signs if that is larger.
    """
    middle, noise = line.middle, line.noise
    products = line.products(line.gradients)
    claimed, size = products.sum().item(), max(size, products.norm().item())
    last_slope = last_bend = torch.nan
    found: list[tuple[float, ...]] = []
    for h in STEPS:
        up, down = line.value(h), line.value(-h)
        slope, bend = (up - down) / (2 * h), (up - 2 * middle + down) / h
        change, kink = slope - last_slope, abs(bend - last_bend / RATIO)
        last_slope, last_bend = slope, bend
        gap, scale = abs(slope - claimed), max(size, abs(slope))
        doubt = abs(change) + kink + noise / h
        if max(doubt, gap) <= TOLERANCE * scale or up == middle == down == middle + claimed:
            return Report("right", gap / (scale or 1.0))
        # Truncation falls tenfold a step where f is smooth, and little is left without it.
        finer, left = abs(slope + change / 9 - claimed), kink + noise / h + abs(change) / 90
        if max(finer, left) <= TOLERANCE * scale:
            return Report("right", finer / scale)
        if h != STEPS[0]:
            found.append((doubt, gap, scale, h))
    doubt, gap, scale, h = min(found)
    agrees = any(found_gap <= 2 * d < gap / 5 for d, found_gap, *_ in found)
    if gap > max(10 * doubt, TOLERANCE * scale) and not agrees:
        averages = [(line.slope(t) + line.slope(-t)) / 2 for t in (h, h / 10)]
        if all(abs(average - claimed) < gap / 3 for average in averages):
            return Report("wrong", gap / scale)
    rounded = noise / STEPS[0] > TOLERANCE * scale
    return Report("inconclusive", gap / scale, (ROUNDED if rounded else COARSE,))
