"""The two terms of Eq. 12, and a self-check of f_K's gradient against central differences."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torchopt
from torch import Tensor, nn
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_map

from unroll.derivatives import DETACHED_FAKES, probe_layers
from unroll.loss import UnrolledGeneratorLoss
from unroll.optimizers import inner_optimizer, unwrap_optimizer
from unroll.stateless import Batch, Stateless, held, map_tensors, tensors
from unroll.steps import At, Point, check_differentiable

TOLERANCE = 1e-5  # of check_gradients; a lost second derivative is seldom below 1e-4
DIRECTIONS = 3  # for each tensor of fakes
STEPS = (
    1e-4,
    1e-5,
    1e-6,
)  # of the central differences; the best one counts, for kinks and round-off


def gradient_terms(
    loss: UnrolledGeneratorLoss,
    fake: Batch,
    real: Batch,
    generator_parameters: Iterable[Tensor],
    *,
    minibatches: Iterable[tuple[Batch, Batch]] | None = None,
    optimizer_state: Any = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the two terms of df_K/dtheta_G (Eq. 12), which sum to the full gradient.

    ::

        df_K/dtheta_G = df/dtheta_G + df/dtheta_D^K * dtheta_D^K/dtheta_G

    Args:
        loss: The unrolled loss, with ``stop_gradient=False``.
        fake: Generated samples, in the graph of ``generator_parameters``, as for ``loss``.
        real: Real samples, as for ``loss``.
        generator_parameters: Tensors to differentiate in, such as ``generator.parameters()``.
        minibatches: As for ``loss``. Default: none.
        optimizer_state: As for ``loss``. Default: none.

    Returns:
        Two tuples of tensors with the shapes of ``generator_parameters``: the first term, how f
        changes with the fakes at a fixed theta_D^K, and the second, how D reacts to a change of G.
        Zeros, never None; the second is zero at K = 0.

    Raises:
        ValueError: ``loss.stop_gradient`` is set, or ``fake`` carries no graph.
        RuntimeError: Gradients are switched off.

    Example:
        >>> import torch, unroll
        >>> g, d = torch.nn.Linear(8, 2), torch.nn.Linear(2, 1)
        >>> loss = unroll.UnrolledGeneratorLoss(
        ...     d, torch.optim.SGD(d.parameters(), lr=0.1), unroll_steps=3
        ... )
        >>> fake, real = g(torch.randn(16, 8)), torch.randn(16, 2)
        >>> first, second = unroll.gradient_terms(loss, fake, real, g.parameters())
        >>> [t.shape for t in second]
        [torch.Size([2, 8]), torch.Size([2])]
    """
    if loss.stop_gradient:
        raise ValueError(
            "loss: must have stop_gradient=False; with stop_gradient=True Eq. 12 has its first "
            "term only. Set loss.stop_gradient = False for this call."
        )
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "gradient_terms: must run with gradients on; it was called under torch.no_grad()."
        )
    check_differentiable(fake, "fake")
    theta_g = list(generator_parameters)
    with held(loss.discriminator):
        pairs = loss._pairs(fake, real, minibatches, needs_graph=True)
        points, _ = loss._look_ahead(pairs, optimizer_state)
        # Cut the graph at theta_D^1..K (and at buffers that carry one): leaves on the near side.
        far: list[Tensor] = []
        near: list[Tensor] = []

        def cut(tensor: Tensor) -> Tensor:
            if tensor.grad_fn is None:
                return tensor
            far.append(tensor)
            near.append(tensor.detach().requires_grad_())
            return near[-1]

        held_points = [
            replace(
                point,
                parameters={name: cut(p) for name, p in point.parameters.items()},
                buffers={name: cut(b) for name, b in point.buffers.items()},
            )
            for point in points
        ]
        value = loss._surrogate(held_points, fake, real)
    gradients = torch.autograd.grad(
        value, [*theta_g, *near], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    first, reactions = gradients[: len(theta_g)], gradients[len(theta_g) :]
    if not far:
        return first, tuple(map(torch.zeros_like, first))
    second = torch.autograd.grad(
        far, theta_g, reactions, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return first, second


@dataclass(frozen=True)
class GradientReport:
    """What :func:`check_gradients` found.

    Attributes:
        ok: Whether the gradient agrees with central differences and nothing is suspicious.
        relative_error: The largest difference between a directional derivative and its central
            difference, over the norm of the gradient.
        suspicions: What may be wrong, in words; empty if nothing is.
    """

    ok: bool
    relative_error: float
    suspicions: tuple[str, ...]


def check_gradients(
    loss: UnrolledGeneratorLoss,
    fake: Batch,
    real: Batch,
    *,
    minibatches: Iterable[tuple[Batch, Batch]] | None = None,
) -> GradientReport:
    """Compare f_K's gradient with central differences, for your own D, optimizer and objective.

    Everything is copied in float64 first, so nothing of yours changes. Random numbers are replayed
    from one state, so that dropout passes. With ``stop_gradient`` the differences are taken with
    theta_D^1..K held. It costs some twenty evaluations of the loss for each tensor of fakes: call
    it once, on a small batch, before training.

    Args:
        loss: The unrolled loss.
        fake: Generated samples, as for ``loss``; they may be detached.
        real: Real samples.
        minibatches: As for ``loss``; exactly K pairs are drawn. Default: none.

    Example:
        >>> import torch, unroll
        >>> d = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.Adam(d.parameters())
        >>> loss = unroll.UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
        >>> unroll.check_gradients(loss, torch.randn(16, 2), torch.randn(16, 2)).ok
        True
    """
    pairs = [(fake, real)]
    if minibatches is not None:
        pairs += loss._pairs(fake, real, minibatches, needs_graph=False)
    copies = map_tensors(_double, pairs)
    fakes = [t.requires_grad_() for f, _ in copies for t in tensors(f) if t.is_floating_point()]
    with (
        torch.random.fork_rng(),
        torch.enable_grad(),
        warnings.catch_warnings(record=True) as caught,
        _calls_to_the_module_itself(loss.discriminator) as strays,
    ):
        warnings.simplefilter("always")
        check = _Check(_in_double(loss), copies[0], copies[1:] if minibatches else None)
        with _calls_to_the_module_itself(check.loss.discriminator) as more_strays:
            try:
                error, suspicions = check.run(fakes)
            except Exception:
                if not strays and not more_strays:
                    raise
                error, suspicions = float("inf"), []
    if strays or more_strays:
        suspicions.append(
            "the objective calls the discriminator module itself; it must call the `discriminator` "
            "that it is given, which is D at theta_D^k"
        )
    if any(str(w.message) == DETACHED_FAKES for w in caught):
        suspicions.append("the objective detaches the fakes in discriminator_loss")
    if error > TOLERANCE and not suspicions:
        suspicions.append(
            "the objective: its own operations have a wrong derivative, or it detaches"
        )
    return GradientReport(error <= TOLERANCE and not suspicions, error, tuple(suspicions))


class _Check:
    """f_K in float64 as a function of its fakes, from one state of the random generators."""

    def __init__(
        self,
        loss: UnrolledGeneratorLoss,
        batch: tuple[Batch, Batch],
        minibatches: Sequence[tuple[Batch, Batch]] | None,
    ) -> None:
        self.loss, self.batch, self.minibatches = loss, batch, minibatches
        self.random_state = _random_state()
        self.held: tuple[list[Point], Any] | None = None  # theta_D^1..K under stop_gradient

    def f(self) -> Tensor:
        fake, real = self.batch
        _set_random_state(self.random_state)
        with held(self.loss.discriminator):
            points, after = self.held or self.points()
            _set_random_state(after)
            return self.loss._surrogate(points, fake, real)

    def points(self) -> tuple[list[Point], Any]:
        pairs = self.loss._pairs(*self.batch, self.minibatches, needs_graph=False)
        points, _ = self.loss._look_ahead(pairs)
        return points, _random_state()

    def run(self, fakes: Sequence[Tensor]) -> tuple[float, list[str]]:
        """Return the relative error and what explains it."""
        if self.loss.stop_gradient:
            with held(self.loss.discriminator):
                self.held = self.points()
        value = self.f()
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
        with held(loss.discriminator):
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

        suspicions = [
            f"wrong second derivative of layer {name} (relative error {error:.1e})"
            for name, error in layers.items()
            if error > TOLERANCE
        ]
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
    points, state = inputs + parameters, _random_state()
    weights: list[Tensor] = []

    def gradient_along_itself() -> Tensor:
        _set_random_state(state)
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
    directions = [torch.randn_like(p) for p in points]
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
        errors.append(abs(difference - derivative) / max(size, abs(difference), 1e-30))
        if errors[-1] < TOLERANCE / 10:
            break
    return min(errors)


def _in_double(loss: UnrolledGeneratorLoss) -> UnrolledGeneratorLoss:
    """Return the loss on float64 copies of D, the optimizer with its state, and the objective."""
    optimizer = unwrap_optimizer(loss.optimizer)
    memo: dict[int, Any] = {}
    for submodule in loss.discriminator.modules():  # deepcopy refuses tensors in a graph
        for value in [*vars(submodule).values(), *submodule._parameters.values()]:
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = nn.Parameter(value.detach().clone())
    impl = getattr(optimizer, "impl", optimizer)
    if isinstance(impl, GradientTransformation):  # pure functions, which deepcopy breaks
        memo[id(impl)] = impl
    originals = (loss.discriminator, optimizer, loss.objective, loss.project)
    module, optimizer, objective, project = copy.deepcopy(originals, memo)
    module.double()
    for part in [*module.modules(), objective, project]:
        _attributes_in_double(part)
    if isinstance(optimizer, torch.optim.Optimizer):
        for state in optimizer.state.values():
            state.update({k: _double(v) for k, v in state.items() if k != "step"})
    elif isinstance(optimizer, torchopt.FuncOptimizer):
        optimizer.optim_state = tree_map(_double, cast(Any, optimizer.optim_state))
    elif isinstance(optimizer, (torchopt.Optimizer, torchopt.MetaOptimizer)):
        optimizer.state_groups = [tree_map(_double, state) for state in optimizer.state_groups]
    double = UnrolledGeneratorLoss(
        module,
        optimizer,
        objective,
        unroll_steps=loss.unroll_steps,
        stop_gradient=loss.stop_gradient,
        average=loss.average,
        project=project,
    )
    double._trainable = loss._trainable
    return double


def _attributes_in_double(part: Any) -> None:
    for name, value in list(getattr(part, "__dict__", {}).items()):
        if isinstance(value, nn.Module):
            value.double()
        elif isinstance(value, Tensor):
            vars(part)[name] = _double(value)
        elif isinstance(part, nn.Module):
            continue
        elif hasattr(value, "__dict__"):
            _attributes_in_double(value)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().clone()
        return value.double() if value.is_floating_point() else value
    return value


@contextmanager
def _calls_to_the_module_itself(module: nn.Module) -> Iterator[list[bool]]:
    """Record forward calls of a module that do not run on parameters of the look-ahead."""
    own = {id(p) for p in module.parameters()}
    found: list[bool] = []

    def hook(module: nn.Module, _: Any) -> None:
        if any(id(p) in own for p in module.parameters()):
            found.append(True)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])
