"""The K look-ahead steps of the discriminator, Eq. 6 to 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unroll.derivatives import discriminator_forward, inspect_step, refuse_own_parameters
from unroll.game.objectives import Objective
from unroll.optimizers import InnerOptimizer
from unroll.stateless import Batch, Stateless, held, map_tensors, mutation_message, tensors

Project = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


class At:
    """D at some theta_D^k: the pure callable that objectives get. Its buffers evolve."""

    def __init__(
        self,
        module: Stateless,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *,
        twice: bool = False,
    ) -> None:
        self.module, self.parameters, self.buffers = module, parameters, buffers
        self.twice = twice

    def __call__(self, batch: Batch) -> Any:
        """Return D(x) for a tensor, D(*x) for a tuple, D(**x) for a mapping."""
        if isinstance(batch, Mapping):
            return self.forward(**batch)
        return self.forward(*batch) if isinstance(batch, tuple) else self.forward(batch)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``D(*args, **kwargs)``."""
        with discriminator_forward(twice=self.twice):
            output, self.buffers = self.module(self.parameters, self.buffers, args, kwargs)
        return output


@dataclass(frozen=True)
class Point:
    """Where the look-ahead stands after k steps."""

    parameters: Mapping[str, Tensor]  # theta_D^k
    buffers: Mapping[str, Tensor]
    optimizer_state: Any
    losses: tuple[Tensor, ...] = ()  # D's before each step that led here, detached


@dataclass
class LookAhead:
    """K steps of D from where it stands, on private copies of all that they change."""

    module: Stateless
    optimizer: InnerOptimizer
    objective: Objective
    moving: frozenset[str]  # names of the parameters that take steps
    constant: bool  # whether theta_D^1..K are constants: no second term in Eq. 12
    project: Project | None
    inspected: bool  # whether a first step has been searched for broken derivatives

    def trajectory(self, batches: Iterable[tuple[Batch, Batch]], *, average: bool) -> list[Point]:
        """Step from theta_D^0 = theta_D (Eq. 6) on each (fake, real).

        Returns theta_D^K, or theta_D^1..K with ``average``.
        """
        point = Point(
            {name: self._leaf(name, p.clone()) for name, p in self.module.parameters.items()},
            self.module.buffers,
            self.optimizer.initial_state(),
        )
        points: list[Point] = []
        for fake, real in batches:
            point = self._step(point, fake, real)
            points = [*points, point] if average else [point]
        return points or [point]

    def _leaf(self, name: str, value: Tensor) -> Tensor:
        return value.detach().requires_grad_(name in self.moving)

    def _step(self, point: Point, fake: Batch, real: Batch) -> Point:
        """Return theta_D^{k+1} = theta_D^k + eta df/dtheta_D^k (Eq. 7)."""
        inspect = (
            not (self.inspected or self.constant)
            and not point.losses
            and any(t.requires_grad for t in tensors((fake, real)))
        )
        if self.constant:
            fake, real = (map_tensors(Tensor.detach, batch) for batch in (fake, real))
        d = At(self.module, point.parameters, point.buffers, twice=not self.constant)
        with torch.enable_grad():
            loss = self.objective.discriminator_loss(d, fake, real)
            check_scalar(loss, "discriminator_loss")
            gradients = self._gradients(loss, point.parameters)
        with (
            torch.set_grad_enabled(not self.constant),
            torch.autocast(loss.device.type, enabled=False),  # optimizers keep full precision
        ):
            theta, state = self.optimizer.step(point.parameters, gradients, point.optimizer_state)
            if self.project is not None:
                theta = self._projected(theta, inspect=inspect)
        if inspect:
            for name, own in self.module.parameters.items():  # .data leaves no other trace
                if not _same(point.parameters[name], own):
                    raise RuntimeError(mutation_message(name))
            module = self.module.module
            refuse_own_parameters(module, loss, tensors((fake, real)))
            inspect_step(module, gradients, tensors(fake), lambda: d(real))
            self.inspected = True
        if self.constant:
            theta = {name: self._leaf(name, value) for name, value in theta.items()}
        return Point(theta, d.buffers, state, (*point.losses, loss.detach()))

    def _gradients(self, loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return df/dtheta_D^k of the moving parameters that the loss depends on."""
        found: dict[str, Tensor] = {}
        if loss.requires_grad:
            moving = {name: p for name, p in parameters.items() if name in self.moving}
            gradients = torch.autograd.grad(
                loss, list(moving.values()), create_graph=not self.constant, allow_unused=True
            )
            pairs = zip(moving, gradients, strict=True)
            found = {name: self._hooked(name, g) for name, g in pairs if g is not None}
        for name, gradient in found.items():
            if gradient.layout != torch.strided:
                raise TypeError(
                    f"discriminator: the gradient of {name!r} is sparse, which the look-ahead "
                    "cannot differentiate. Build the layer with sparse=False."
                )
        if not found:
            raise ValueError(
                "objective: discriminator_loss must depend on the parameters of the discriminator "
                "it is given; its loss depends on none that the optimizer trains. Call the "
                "`discriminator` argument, not the module itself, and do not detach its output."
            )
        return found

    def _hooked(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient as the hooks of the real parameter leave it."""
        for hook in (self.module.parameters[name]._backward_hooks or {}).values():
            replaced = hook(gradient)
            gradient = gradient if replaced is None else replaced
        return gradient

    def _projected(self, theta: dict[str, Tensor], *, inspect: bool) -> dict[str, Tensor]:
        assert self.project is not None
        # Clones, so that a projection may write in place, as one of real parameters does.
        given = {name: value.clone() for name, value in theta.items()}
        histories = {name: value.grad_fn for name, value in given.items()}
        projected = self.project(dict(given))
        if not isinstance(projected, Mapping) or projected.keys() != theta.keys():
            got = list(projected) if isinstance(projected, Mapping) else type(projected).__name__
            raise ValueError(
                "project: must return a mapping with the names that it was given, "
                f"{list(theta)}; got {got}. Return all parameters, changed or not."
            )
        for name, value in projected.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"project: must return tensors; {name!r} is a {type(value).__name__}. Keep the "
                    "parameters as tensors, so that they can be differentiated through."
                )
            if value.shape != theta[name].shape:
                raise ValueError(
                    f"project: must keep the shapes of the parameters; {name!r} came with "
                    f"{tuple(theta[name].shape)} and left with {tuple(value.shape)}."
                )
            if self.constant or not theta[name].requires_grad:
                continue
            untracked = inspect and value.grad_fn is histories[name]
            if not value.requires_grad or (untracked and not _same(value, theta[name])):
                raise ValueError(
                    f"project: must be differentiable; it changed {name!r} outside autograd (under "
                    "torch.no_grad(), through .data, or detached). Use p.clamp(...) and the like."
                )
        return dict(projected)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())


@dataclass(frozen=True, eq=False)
class UnrolledDiscriminator:
    """What K look-ahead steps lead to: callable like D, at theta_D^K.

    Attributes:
        parameters: Every parameter name of the unwrapped D, with its tensor in theta_D^K. In the
            graph of the fakes, unless ``stop_gradient`` is set or nothing required a gradient.
        buffers: Every buffer name of D, with its tensor after the K steps, detached.
        optimizer_state: The optimizer's state after the K steps, in the optimizer's own form: what
            a torchopt transformation's ``update`` returned, a tuple of those for a torchopt
            optimizer, a mapping from parameter names to states for a ``torch.optim`` one.
        losses: D's loss before each step, shape ``(K,)``, detached.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer_state: Any
    losses: Tensor
    _module: nn.Module = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``D(*args, **kwargs)`` at theta_D^K; neither D nor the buffers change."""
        with held(self._module):
            d = At(Stateless(self._module), self.parameters, self.buffers)
            return d.forward(*args, **kwargs)


def checked_steps(unroll_steps: object) -> int:
    """Return K, or refuse what is not a count."""
    if not isinstance(unroll_steps, int) or isinstance(unroll_steps, bool):
        raise TypeError(
            "unroll_steps: must be an int, the number K of look-ahead steps; got "
            f"{unroll_steps!r} ({type(unroll_steps).__name__})."
        )
    if unroll_steps < 0:
        raise ValueError(
            f"unroll_steps: must be at least 0; got {unroll_steps}. Use 0 for the ordinary loss."
        )
    return unroll_steps


def check_scalar(loss: Tensor, method: str) -> None:
    """Refuse a loss that is not a 0-d tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"objective: {method} must return a 0-d tensor; got {type(loss).__name__}. Return the "
            "loss as torch computed it."
        )
    if loss.dim() != 0:
        raise ValueError(
            f"objective: {method} must return a 0-d tensor; got shape {tuple(loss.shape)}. Reduce "
            "it with .mean()."
        )


def minibatches_checked(
    minibatches: Iterable[tuple[Batch, Batch]], steps: int, *, needs_graph: bool
) -> Iterator[tuple[Batch, Batch]]:
    """Yield exactly ``steps`` (fake_k, real_k) pairs, and draw no more than that."""
    if not isinstance(minibatches, Iterable):
        raise TypeError(
            "minibatches: must be an iterable of (fake, real) pairs; got "
            f"{type(minibatches).__name__}. Pass for instance a list of {steps} pairs."
        )
    iterator = iter(minibatches)
    for k in range(steps):
        try:
            pair = next(iterator)
        except StopIteration:
            raise ValueError(
                f"minibatches: must hold one (fake, real) pair for each of the {steps} look-ahead "
                f"steps; only {k} came. Pass {steps} pairs or set unroll_steps={k}."
            ) from None
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                "minibatches: must yield (fake, real) pairs; item "
                f"{k} is a {type(pair).__name__}. Yield (generator(z), real)."
            )
        if needs_graph:
            check_differentiable(pair[0], f"minibatches, fake {k}")
        yield pair[0], pair[1]


def check_differentiable(fake: Batch, what: str) -> None:
    """Refuse fakes without a path to a generator."""
    if not any(t.requires_grad for t in tensors(fake)):
        raise ValueError(
            f"{what}: must carry the generator's graph, through which both terms of Eq. 12 flow; "
            "no tensor in it requires a gradient. Do not detach it or make it under "
            "torch.no_grad(). To evaluate only, call the loss under torch.no_grad(); for the "
            "first term alone, set stop_gradient=True."
        )
