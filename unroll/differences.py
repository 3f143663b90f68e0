"""Central differences of f_K and of its parts, on float64 copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
import torchopt
from torch import Tensor, nn
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_leaves, tree_map

from unroll.inspection import innermost, probe_layers
from unroll.loss import UnrolledGeneratorLoss
from unroll.optimizers import inner_optimizer, unwrap_optimizer
from unroll.randomness import random_state, set_random_state
from unroll.stateless import Batch, Stateless, hooked, tensors
from unroll.steps.discriminator import At, Point

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
        batch: tuple[Batch, Batch],
        minibatches: Sequence[tuple[Batch, Batch]] | None,
    ) -> None:
        self.loss, self.batch, self.minibatches = loss, batch, minibatches
        self.device = next(loss.discriminator.parameters()).device
        self.random_state = random_state(self.device)
        self.held: tuple[list[Point], Any] | None = None  # theta_D^1..K under stop_gradient

    def f(self) -> Tensor:
        """Return f_K."""
        fake, real = self.batch
        set_random_state(self.random_state, self.device)
        with self.loss._held():
            points, after = self.held or self.points()
            set_random_state(after, self.device)
            return self.loss._surrogate(points, fake, real)

    def points(self) -> tuple[list[Point], Any]:
        """Return theta_D^0..K, and the random state after the look-ahead."""
        pairs = self.loss._pairs(*self.batch, self.minibatches, needs_graph=False)
        points, _ = self.loss._look_ahead(pairs)
        return points, random_state(self.device)

    def run(self, fakes: Sequence[Tensor]) -> tuple[float, list[str]]:
        """Return the relative error and what explains it."""
        if self.loss.stop_gradient:
            with self.loss._held():
                self.held = self.points()
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
        with loss._held():
            module = Stateless(loss.discriminator)
            theta = {name: p.detach().requires_grad_() for name, p in module.parameters.items()}
            d = At(module, theta, module.buffers, twice=True)
            layers = probe_layers(
                loss.discriminator,
                lambda: loss.objective.discriminator_loss(d, fake, real),
                _second_derivative_error,
            )
            value = loss.objective.discriminator_loss(d, fake, real)
        found = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
        pairs = zip(theta, found, strict=True)
        gradients = {name: g.requires_grad_() for name, g in pairs if g is not None}
        optimizer = inner_optimizer(loss.optimizer, module.parameters)

        def moved(project: bool) -> Callable[[], Tensor]:
            def norm() -> Tensor:
                new, _ = optimizer.step(theta, gradients, optimizer.initial_state())
                new = dict(loss.project(new)) if project and loss.project is not None else new
                return torch.cat([p.flatten() for p in new.values()]).square().sum()

            return norm

        wrong = innermost([name for name, error in layers.items() if error > TOLERANCE])
        suspicions = [
            f"wrong second derivative of layer {name} (relative error {layers[name]:.1e})"
            for name in wrong
        ]
        for name, gradient in gradients.items():

            def norm(parameter: Tensor = module.parameters[name], g: Tensor = gradient) -> Tensor:
                return hooked(parameter, g).square().sum()

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


def in_double(loss: UnrolledGeneratorLoss) -> UnrolledGeneratorLoss:
    """Return the loss on float64 copies of D, the optimizer with its state, and the objective."""
    optimizer = unwrap_optimizer(loss.optimizer)
    memo: dict[int, Any] = {}
    # deepcopy refuses tensors in a graph: a MetaOptimizer's parameters, torchopt's states.
    for submodule in loss.discriminator.modules():
        for value in tensors(vars(submodule)):
            if value.grad_fn is not None:
                memo[id(value)] = nn.Parameter(value.detach().clone())
            elif value.layout != torch.strided:
                memo[id(value)] = value.clone()
    states = [getattr(optimizer, name, None) for name in ("state_groups", "optim_state")]
    for value in tree_leaves(cast(Any, states)):
        if isinstance(value, Tensor):
            memo[id(value)] = value.detach().clone()
    impl = getattr(optimizer, "impl", optimizer)
    if isinstance(impl, GradientTransformation):  # pure functions, which deepcopy breaks
        memo[id(impl)] = impl
    module = _copied("discriminator", loss.discriminator, memo)
    optimizer = _copied("optimizer", optimizer, memo)
    objective = _copied("objective", loss.objective, memo)
    project = _copied("project", loss.project, memo)
    _in_double([module, objective, project], set())
    if isinstance(optimizer, torch.optim.Optimizer):
        for state in optimizer.state.values():
            state.update({k: double(v) for k, v in state.items() if k != "step"})
    elif isinstance(optimizer, torchopt.FuncOptimizer):
        optimizer.optim_state = tree_map(double, cast(Any, optimizer.optim_state))
    elif isinstance(optimizer, (torchopt.Optimizer, torchopt.MetaOptimizer)):
        optimizer.state_groups = [tree_map(double, state) for state in optimizer.state_groups]
    copied = UnrolledGeneratorLoss(
        module,
        optimizer,
        objective,
        unroll_steps=loss.unroll_steps,
        stop_gradient=loss.stop_gradient,
        average=loss.average,
        checkpoint=loss.checkpoint,
        project=project,
        sync=False,  # the copies are this rank's alone
    )
    originals = dict(loss.discriminator.named_parameters())
    frozen = {id(p) for p in loss._frozen}
    copied._frozen = tuple(
        p for n, p in copied.discriminator.named_parameters() if id(originals[n]) in frozen
    )
    for name, parameter in copied.discriminator.named_parameters():
        parameter._backward_hooks = originals[name]._backward_hooks  # which deepcopy leaves out
    return copied


# What deepcopy does not copy, and optimizers, whose states are looked after apart.
_LEFT = (
    *(FunctionType, BuiltinFunctionType, ModuleType, type),
    *(torch.optim.Optimizer, torchopt.Optimizer, torchopt.FuncOptimizer, torchopt.MetaOptimizer),
)


def _copied(name: str, part: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(part, memo)
    except Exception as error:
        raise TypeError(
            f"{name}: must be what copy.deepcopy can copy, for check_gradients to work on a copy; "
            f"it cannot ({type(error).__name__}: {error}). Keep locks, loggers and writers out of "
            "it, or give them a __deepcopy__."
        ) from error


def _in_double(value: Any, seen: set[int]) -> Any:
    """Return what a copy holds in float64; objects and containers are changed in place."""
    if isinstance(value, Tensor):
        return double(value)
    if id(value) in seen or isinstance(value, _LEFT):
        return value
    seen.add(id(value))
    if isinstance(value, MethodType):
        _in_double(value.__self__, seen)
    elif isinstance(value, nn.Module):
        value.double()
        own = {k: v for k, v in vars(value).items() if k not in ("_parameters", "_buffers")}
        vars(value).update({k: _in_double(v, seen) for k, v in own.items()})
    elif isinstance(value, dict):
        value.update({k: _in_double(v, seen) for k, v in value.items()})
    elif isinstance(value, list):
        value[:] = [_in_double(v, seen) for v in value]
    elif isinstance(value, tuple):
        found = [_in_double(v, seen) for v in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    elif hasattr(value, "__dict__"):
        vars(value).update({k: _in_double(v, seen) for k, v in vars(value).items()})
    return value


def double(value: Any) -> Any:
    """Return a copy of a tensor, detached and in float64 if it is floating-point."""
    if isinstance(value, Tensor):
        value = value.detach().clone()
        return value.double() if value.is_floating_point() else value
    return value
