"""The surrogate generator loss f_K, Eq. 9."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torchopt.pytree import tree_map

from unroll.game import check_objective, parts, warn_of_sigmoid
from unroll.game.objectives import Minimax, Objective
from unroll.inspection import warn_of_gradient_hooks
from unroll.optimizers import inner_optimizer, warn_of_step_hooks
from unroll.stateless import Batch, Stateless, held, tensors
from unroll.steps.checks import (
    Project,
    check_differentiable,
    checked_discriminator,
    checked_steps,
    minibatches_checked,
)
from unroll.steps.compiled import CompiledStep
from unroll.steps.discriminator import Point, UnrolledDiscriminator, start
from unroll.steps.lookahead import LookAhead
from unroll.steps.ranks import agreed, resolved_sync
from unroll.steps.surrogate import Surrogate


class UnrolledGeneratorLoss(nn.Module):
    """The generator's loss at a discriminator that looks K steps ahead.

    The surrogate objective of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
    Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163)::

        theta_D^0     = theta_D                                              (6)
        theta_D^{k+1} = theta_D^k + eta df(theta_G, theta_D^k)/dtheta_D^k        (7)
        f_K(theta_G, theta_D) = f(theta_G, theta_D^K(theta_G, theta_D))          (9)

    with a step of the given optimizer in place of ``eta df``. The steps are differentiated
    through, so that the generator learns how the discriminator would react to it. Nothing that
    the caller holds changes: D, its buffers and gradients, the optimizer and its state.

    Time grows linearly with K, and memory too: by the activations of a step of D, or with
    ``checkpoint`` by D's parameters and optimizer state. The wrapper owns no parameters, buffers or
    submodules.

    Args:
        discriminator: Any ``nn.Module``. It may be wrapped by ``torch.compile``.
        optimizer: What trains the discriminator, as it is: a ``torch.optim`` optimizer, a torchopt
            ``Optimizer``, ``MetaOptimizer`` or ``FuncOptimizer`` (each with its live state), or a
            bare torchopt transformation such as ``torchopt.adam(1e-4)``. A bare transformation
            starts afresh at every call, with Adam's step count and learning-rate schedules, unless
            the call gets ``optimizer_state``; prefer the optimizer that trains D.
        objective: The game, see :class:`unroll.Objective`. Default: :class:`unroll.Minimax`.
        unroll_steps: K, at least 0. A plain attribute: it may change between calls. K = 0 is the
            ordinary generator loss.
        stop_gradient: Keep the first term of Eq. 12 only: theta_D^K is a constant. Default False.
        average: Return the mean of f_1, ..., f_K in place of f_K (App. B.2); f_0 where K = 0.
            Default False.
        checkpoint: Keep of each step what it starts from, and compute it again in the backward
            pass: activations are those of one step whatever K is, for one more evaluation of D's
            gradient a step. f_K is then differentiable once, and D's code, modes and buffers and
            the objective must be the same in both runs, or an error says so. Default False.
        compile: Run the steps as code that ``torch.compile`` makes of one step and its adjoint, for
            all K alike; f_K is then differentiable once. Faster for small D's; the first call takes
            10 to 60 s. New code is compared with the eager step, derivatives included, before
            its first use. D, objectives and optimizers that torch.compile cannot follow run as
            without it, after a warning that says why. Default False.
        project: Called after every look-ahead step with a mapping from parameter names to tensors;
            returns the mapping with the projected ones (WGAN's clipping, a weight normalisation).
            It is differentiated through. Default: none.
        sync: Average D's gradients over all ranks of ``torch.distributed`` in every step, so that
            the ranks play one game over the global batch (for objectives that are means over
            samples, and equal batches; BatchNorm and RelativisticAverage stay those of a rank).
            Wrap G in DistributedDataParallel, too. Default None: where D is wrapped in it.

    Raises:
        TypeError: The optimizer, the discriminator, ``unroll_steps`` or ``sync`` is of an
            unsupported type.
        ValueError: ``unroll_steps`` is negative, D has no parameters or uninitialised ones, the
            optimizer holds none of them or cannot be differentiated, or ``sync`` is True without a
            process group.

    Example:
        >>> import torch, unroll
        >>> generator, discriminator = torch.nn.Linear(8, 2), torch.nn.Linear(2, 1)
        >>> d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-4, betas=(0.5, 0.999))
        >>> unrolled = unroll.UnrolledGeneratorLoss(discriminator, d_optimizer, unroll_steps=5)
        >>> g_loss = unrolled(generator(torch.randn(16, 8)), torch.randn(16, 2))
        >>> g_loss.backward()
    """

    def __init__(
        self,
        discriminator: nn.Module,
        optimizer: Any,
        objective: Objective = Minimax(),
        *,
        unroll_steps: int,
        stop_gradient: bool = False,
        average: bool = False,
        checkpoint: bool = False,
        compile: bool = False,
        project: Project | None = None,
        sync: bool | None = None,
    ) -> None:
        super().__init__()
        self.discriminator = discriminator  # checked where they are set, here and later
        self.objective = objective
        warn_of_sigmoid(self.discriminator, objective)
        warn_of_step_hooks(optimizer)
        warn_of_gradient_hooks(self.discriminator)
        inner_optimizer(optimizer, dict(self.discriminator.named_parameters()))
        if project is not None and not callable(project):
            raise TypeError(
                "project: must be a function from a mapping of parameters to one; got "
                f"{type(project).__name__}. Pass for instance a function that clamps each of them."
            )
        self.optimizer = optimizer
        self.project = project
        self.unroll_steps = unroll_steps
        self.stop_gradient = stop_gradient
        self.average = average
        self.checkpoint = checkpoint
        self._compile = compile
        self.sync, self._group = resolved_sync(discriminator, sync)
        checked_steps(unroll_steps)

    _frozen: tuple[Tensor, ...]  # parameters of D that stay where they are
    _inspected: bool
    _inspected_value: bool
    _compiled: CompiledStep | None

    def __setattr__(self, name: str, value: object) -> None:
        """Set a plain attribute: nn.Module's own would make D a submodule of its loss."""
        if name == "discriminator":
            value = checked_discriminator(value)
        elif name == "objective":
            check_objective(value)
        object.__setattr__(self, name, value)
        if name in ("discriminator", "optimizer", "objective", "project", "checkpoint"):
            object.__setattr__(self, "_inspected", False)
            object.__setattr__(self, "_inspected_value", False)
        if name in ("discriminator", "optimizer") and hasattr(self, "optimizer"):
            object.__setattr__(self, "_frozen", self._frozen_parameters())
        if name in ("discriminator", "optimizer", "objective", "project", "_compile"):
            compiled = CompiledStep() if getattr(self, "_compile", False) else None
            object.__setattr__(self, "_compiled", compiled)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step calls it as it is
    def forward(
        self,
        fake: Batch,
        real: Batch,
        *,
        minibatches: Iterable[tuple[Batch, Batch]] | None = None,
        optimizer_state: Any = None,
    ) -> Tensor:
        """Return f_K (Eq. 9), a 0-d tensor that is differentiable in ``fake``.

        Args:
            fake: Generated samples with the generator's graph: a tensor ``(N, ...)`` for ``D(x)``,
                a tuple for ``D(*x)`` or a mapping for ``D(**x)``.
            real: Real samples, in the same form.
            minibatches: K pairs ``(fake_k, real_k)``, one for each look-ahead step; f itself uses
                ``(fake, real)``. Consumed lazily. Default: ``(fake, real)`` in every step, as in
                the paper's experiments.
            optimizer_state: Only with a bare transformation: what its ``init`` returned for
                ``tuple(discriminator.parameters())``, or an update of that. Default: afresh.

        Raises:
            ValueError: ``fake`` has no path to a generator while gradients are on, ``minibatches``
                holds fewer than K pairs, or a loss is not 0-d or not a function of D.
            RuntimeError: Called in inference mode, D changes its parameters in place, a layer has
                no second derivative, or with ``sync`` the ranks disagree on K.
        """
        needs_graph = torch.is_grad_enabled() and not self.stop_gradient
        pairs = self._pairs(fake, real, minibatches, needs_graph=needs_graph)
        with self._held():
            if self.unroll_steps or self.sync or optimizer_state is not None:
                points, _ = self._look_ahead(pairs, optimizer_state)
            else:  # f_0 needs no optimizer
                points = [start(Stateless(self.discriminator))]
            return self._surrogate(points, fake, real)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def unroll(
        self,
        fake: Batch,
        real: Batch,
        *,
        minibatches: Iterable[tuple[Batch, Batch]] | None = None,
        optimizer_state: Any = None,
    ) -> UnrolledDiscriminator:
        """Return the discriminator after K steps (Eq. 6-7), without touching the real one.

        Arguments and errors are those of :meth:`forward`, except that ``fake`` may be detached;
        the result then consists of constants. ``average`` does not matter.
        """
        seen: list[Tensor] = []

        def recorded() -> Iterator[tuple[Batch, Batch]]:
            for pair in self._pairs(fake, real, minibatches, needs_graph=False):
                seen.extend(tensors(pair))
                yield pair

        with self._held():
            points, ahead = self._look_ahead(recorded(), optimizer_state)
        last, losses = points[-1], ahead.losses
        in_graph = any(t.requires_grad for t in seen) and not self._constant
        keep = _unchanged if in_graph else _detached
        nothing = next(iter(last.parameters.values())).new_empty(0)
        return UnrolledDiscriminator(
            parameters={name: keep(p) for name, p in last.parameters.items()},
            buffers={name: b.detach().clone() for name, b in last.buffers.items()},
            optimizer_state=tree_map(keep, ahead.optimizer.export(last.optimizer_state)),
            losses=torch.stack(losses) if losses else nothing,
            _module=self.discriminator,
        )

    def _held(self) -> AbstractContextManager[None]:
        """Return the context in which D and the objective are used, and given back as they were."""
        return held(self.discriminator, parts(self.objective))

    def _frozen_parameters(self) -> tuple[Tensor, ...]:
        """Return which of the parameters that the optimizer holds require no gradient now."""
        parameters = dict(self.discriminator.named_parameters())
        try:
            names = inner_optimizer(self.optimizer, parameters).names
        except ValueError:  # one of the two is assigned before the other
            return ()
        frozen = tuple(parameters[name] for name in names if not parameters[name].requires_grad)
        return frozen if len(frozen) < len(names) else ()  # a loop may freeze D for its G step

    def _moving(self, parameters: Mapping[str, Tensor], names: Iterable[str]) -> frozenset[str]:
        """Return the names of the parameters that take steps, those that D has gained included."""
        frozen = {id(p) for p in self._frozen}
        held_ones = {name: parameters[name] for name in names}
        return frozenset(
            name for name, p in held_ones.items() if p.is_floating_point() and id(p) not in frozen
        )

    @property
    def _constant(self) -> bool:
        """Whether theta_D^1..K are constants: no second term in Eq. 12."""
        return self.stop_gradient or not torch.is_grad_enabled()

    def _look_ahead(
        self, pairs: Iterable[tuple[Batch, Batch]], optimizer_state: Any = None
    ) -> tuple[list[Point], LookAhead]:
        """Return where f is evaluated, and what led there; D must be held."""
        module = Stateless(self.discriminator)
        optimizer = inner_optimizer(self.optimizer, module.parameters, optimizer_state)
        ahead = LookAhead(
            module=module,
            optimizer=optimizer,
            objective=self.objective,
            moving=self._moving(module.parameters, optimizer.names),
            constant=self._constant,
            checkpoint=self.checkpoint,
            project=self.project,
            sync=self.sync,
            group=self._group,
            compiled=self._compiled,
            inspected=self._inspected,
        )
        points = ahead.trajectory(pairs, average=self.average)
        self._inspected = ahead.inspected
        return points, ahead

    def _surrogate(self, points: list[Point], fake: Batch, real: Batch) -> Tensor:
        """Return f at theta_D^K, or its mean over theta_D^1..K; D must be held."""
        surrogate = Surrogate(
            module=self.discriminator,
            objective=self.objective,
            constant=self._constant,
            checkpoint=self.checkpoint,
            inspected=self._inspected_value,
        )
        value = surrogate(points, fake, real)
        self._inspected_value = surrogate.inspected
        return value

    def extra_repr(self) -> str:
        """Return the settings, for ``print``."""
        return (
            f"{type(self.discriminator).__name__}, {type(self.optimizer).__name__}, "
            f"{self.objective}, unroll_steps={self.unroll_steps}, "
            f"stop_gradient={self.stop_gradient}, average={self.average}, "
            f"checkpoint={self.checkpoint}, compile={self._compile}, sync={self.sync}"
        )

    def _pairs(
        self,
        fake: Batch,
        real: Batch,
        minibatches: Iterable[tuple[Batch, Batch]] | None,
        *,
        needs_graph: bool,
    ) -> Iterable[tuple[Batch, Batch]]:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "UnrolledGeneratorLoss: the look-ahead differentiates and so cannot run in "
                "torch.inference_mode(). Use torch.no_grad() for a value without a graph."
            )

        def drawn() -> Iterable[tuple[Batch, Batch]]:
            if needs_graph:
                check_differentiable(fake, "fake")
            steps = checked_steps(self.unroll_steps)
            if minibatches is None:
                return repeat((fake, real), steps)
            return minibatches_checked(minibatches, steps, needs_graph=needs_graph)

        if not self.sync:
            return drawn()
        settings = {"a graph is needed": not self._constant, "checkpoint": self.checkpoint}
        device = next(self.discriminator.parameters()).device
        return agreed(lambda: list(drawn()), settings, device, self._group)


def _unchanged(tensor: Any) -> Any:
    return tensor


def _detached(tensor: Any) -> Any:
    return tensor.detach() if isinstance(tensor, Tensor) else tensor
