"""Central differences of f_K and of its parts, on float64 copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unroll._functional import Pair, preserved, tensors
from unroll._look_ahead import Point, Value, after_hooks, surrogate
from unroll._loss import UnrolledGeneratorLoss
from unroll._probes import innermost, probe_layers
from unroll._random import random_state, set_random_state

TOLERANCE = 1e-5  # of check_gradients; a lost second derivative is seldom below 1e-4
DIRECTIONS = 3  # for each tensor of fakes
# Of the central differences, relative to the size of what is perturbed. Where one meets a kink or
# round-off, the next is tried.
STEPS = (1e-5, 1e-4, 1e-6, 1e-7, 1e-3)
ROUND_OFF = 8 * torch.finfo(torch.float64).eps  # of f_K, relative


class DifferenceCheck:
    """f_K in float64 as a function of its fakes, from one state of the random generators."""

    def __init__(
        self,
        loss: UnrolledGeneratorLoss,
        batch: Pair,
        minibatches: Sequence[Pair] | None,
    ) -> None:
        self.loss, self.batch, self.minibatches = loss, batch, minibatches
        self.device = next(loss.discriminator.parameters()).device
        self.random_state = random_state(self.device)
        self.constants: tuple[Sequence[Point], Value, Any] | None = None  # under stop_gradient

    def f(self) -> Tensor:
        """Return f_K."""
        set_random_state(self.random_state, self.device)
        with preserved(*self.loss._parts):
            points, value, after = self.constants or self.points()
            set_random_state(after, self.device)
            return surrogate(value, points, self.batch)

    def points(self) -> tuple[Sequence[Point], Value, Any]:
        """Return where f is evaluated, f, and the random state after the look-ahead."""
        pairs = self.loss._pairs(self.batch, self.minibatches, differentiable=False)
        points, value = self.loss._points(self.batch, pairs)
        return points, value, random_state(self.device)

    def run(self, fakes: Sequence[Tensor]) -> tuple[float, list[str]]:
        """Return the relative error and what explains it."""
        if self.loss.stop_gradient:
            with preserved(*self.loss._parts):
                self.constants = self.points()
        value = self.f()
        if value.dtype != torch.float64:
            return float("inf"), [
                f"D or the objective computes in {value.dtype}, whatever it is given, which is too "
                "coarse for differences. Check with one that keeps the precision of its input"
            ]
        if not bool(value.isfinite()):
            return float("inf"), [f"f_K itself is {value.item()}: lower D's learning rate"]
        if not torch.equal(value, self.f()):
            return float("inf"), [
                "two calls from one random state differ: something draws from another generator "
                "than torch's global one, or keeps state between calls"
            ]
        gradients = torch.autograd.grad(value, fakes, allow_unused=True, materialize_grads=True)
        if not all(bool(g.isfinite().all()) for g in gradients):
            return float("inf"), [
                "the gradient is not finite: an operation of the objective, the optimizer or D has "
                "no finite slope here (for a torchopt transformation, try eps_root=1e-8)"
            ]
        size = torch.cat([g.flatten() for g in gradients]).norm().item()
        if 0 < size < ROUND_OFF * abs(value.item()) / max(STEPS) / TOLERANCE:
            return float("inf"), [
                f"the gradient (norm {size:.1e}) is too small beside f_K = {value.item():.1e} to "
                "be checked: D is saturated. Check with a discriminator that is less sure"
            ]
        errors = [
            _directional_error(lambda: self.f().item(), [fake], [gradient], size)
            for fake, gradient in zip(fakes, gradients, strict=True)
            for _ in range(DIRECTIONS)
        ]
        error = max(errors)
        explain = error > TOLERANCE and not self.loss.stop_gradient and self.loss.unroll_steps > 0
        return error, self.explanations() if explain else []

    def explanations(self) -> list[str]:
        """Differentiate the parts of one look-ahead step on their own."""
        loss, (fake, real) = self.loss, (self.minibatches or [self.batch])[0]
        with preserved(*loss._parts):
            game, point = loss._start(None)
            theta = {name: p.requires_grad_() for name, p in point.parameters.items()}

            def d_loss() -> Tensor:
                objective, d = loss.objective, game.discriminator
                value, _ = d(
                    lambda d: objective.discriminator_loss(d, fake, real), theta, point.buffers
                )
                return value

            layers = probe_layers(loss.discriminator, d_loss, _second_derivative_error)
            value = d_loss()
        found = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
        pairs = zip(theta, found, strict=True)
        gradients = {name: g.requires_grad_() for name, g in pairs if g is not None}
        own, optimizer = game.discriminator.parameters, game.optimizer

        def moved(project: bool) -> Callable[[], Tensor]:
            def norm() -> Tensor:
                state = optimizer.initial_state
                new, _ = optimizer.step(theta, gradients, state, optimizer.settings)
                new = dict(loss.project(new)) if project and loss.project is not None else new
                return torch.cat([p.flatten() for p in new.values()]).square().sum()

            return norm

        wrong = innermost([name for name, error in layers.items() if error > TOLERANCE])
        suspicions = [
            f"wrong second derivative of layer {name} (relative error {layers[name]:.1e})"
            for name in wrong
        ]
        for name, gradient in gradients.items():

            def norm(name: str = name, g: Tensor = gradient) -> Tensor:
                return after_hooks(own[name], g, name).square().sum()

            if _scalar_error(norm, [gradient]) > TOLERANCE:
                suspicions.append(
                    f"wrong derivative of the gradient hook of {name!r} (does it clip, detached?)"
                )
        if _scalar_error(moved(project=False), list(gradients.values())) > TOLERANCE:
            suspicions.append(
                "wrong derivative of the optimizer's update (does it clip, detached?)"
            )
        elif _scalar_error(moved(project=True), list(gradients.values())) > TOLERANCE:
            suspicions.append("wrong derivative of project= (does it detach?)")
        return suspicions


def _second_derivative_error(
    layer: Callable[[], Any], inputs: list[Tensor], parameters: list[Tensor]
) -> float:
    points = inputs + parameters
    state = random_state(points[0].device)
    weights: list[Tensor] = []

    def gradient_along_itself() -> Tensor:
        set_random_state(state, points[0].device)
        outputs = [t for t in tensors(layer()) if t.requires_grad]
        value = torch.stack([(t + t.square()).sum() for t in outputs]).sum()
        gradients = torch.autograd.grad(value, points, create_graph=True, materialize_grads=True)
        if not weights:
            weights.extend(map(torch.randn_like, gradients))
        return torch.stack([(g * w).sum() for g, w in zip(gradients, weights, strict=True)]).sum()

    return _scalar_error(gradient_along_itself, points)


def _scalar_error(function: Callable[[], Tensor], points: Sequence[Tensor]) -> float:
    gradients = torch.autograd.grad(function(), points, allow_unused=True, materialize_grads=True)
    size = torch.cat([g.flatten() for g in gradients]).norm().item()
    return _directional_error(lambda: function().item(), points, gradients, size)


def _directional_error(
    function: Callable[[], float],
    points: Sequence[Tensor],
    gradients: Sequence[Tensor],
    size: float,
) -> float:
    """Return |central difference - derivative| / size along a random direction."""
    directions = [torch.randn_like(p) * (p.detach().square().mean().sqrt() or 1.0) for p in points]
    scale = torch.cat([d.flatten() for d in directions]).square().mean().sqrt().item()
    derivative = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    errors = []
    for h in STEPS:
        values = []
        for sign in (1, -1):
            saved = [p.detach().clone() for p in points]
            for p, d in zip(points, directions, strict=True):
                p.data.add_(d, alpha=sign * h)
            values.append(function())
            for p, s in zip(points, saved, strict=True):
                p.data.copy_(s)
        difference = (values[0] - values[1]) / (2 * h)
        gap, noise = abs(difference - derivative), ROUND_OFF * max(map(abs, values)) / h
        magnitude = max(size * scale, abs(difference), 1e-300)
        if gap <= noise and noise > TOLERANCE * magnitude:
            continue  # a wrong derivative would drown in round-off, too
        errors.append(max(gap - noise, 0.0) / magnitude)
        if errors[-1] < TOLERANCE / 10:
            break
    return min(errors, default=0.0)
