"""The surrogate generator loss f_K, Eq. 9."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torchopt.pytree import tree_map

from unroll._autograd_fixes import recomputation_refused
from unroll._functional import Batch, Functional, Pair, preserved, tensors
from unroll._inspection import inspect_step, inspect_value, recomputes, warn_of_gradient_hooks
from unroll._look_ahead import (
    Game,
    Point,
    Step,
    Value,
    generator_value,
    inner_step,
    look_ahead,
    start,
    surrogate,
    without_graph,
)
from unroll._modes.checkpointed import checkpointed, refuse_unrepeatable
from unroll._modes.compiled import Code
from unroll._modes.distributed import agreed, averaged, resolved_sync
from unroll._modes.evaluated import evaluated
from unroll._objectives import Minimax, Objective
from unroll._optimizers import inner_optimizer, warn_of_step_hooks
from unroll._penalties import summands
from unroll._random import random_state, replayed
from unroll._unrolled_discriminator import UnrolledDiscriminator
from unroll._validation import (
    Project,
    check_differentiable,
    check_objective,
    check_project,
    checked_discriminator,
    checked_steps,
    drawn_minibatches,
    warn_of_sigmoid,
)

F = TypeVar("F", bound=Callable[..., Any])


def _outside_compiled_code(method: F) -> F:
    """Let a method run as Python inside what ``torch.compile`` traces, its own steps included."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # importing the decorator's module takes seconds
            disable: Any = torch.compiler.disable
            return disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return cast(F, run)


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
        unroll_steps: K, at least 0; 0 is the ordinary generator loss. It may be assigned later, so
            that K can be scheduled; the other arguments may not.
        stop_gradient: Keep the first term of Eq. 12 only: theta_D^K is a constant. Default False.
        average: Return the mean of f_1, ..., f_K in place of f_K (App. B.2); f_0 where K = 0.
            Default False.
        checkpoint: Keep only what each step starts from, and compute the step again in the
            backward pass: activations are those of one step whatever K is, for one more evaluation
            of D's gradient a step. f_K is then differentiable once, and D's code, modes and buffers
            and the objective must be the same in both runs, or an error says so. Default False.
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
        module = checked_discriminator(discriminator)
        check_objective(objective)
        check_project(project)
        warn_of_sigmoid(module, objective)
        warn_of_step_hooks(optimizer)
        warn_of_gradient_hooks(module)
        held = inner_optimizer(optimizer, dict(module.named_parameters())).names
        averages, group = resolved_sync(discriminator, sync)
        # Not as attributes of an nn.Module: D would become a submodule of its loss.
        vars(self).update(
            discriminator=module,
            optimizer=optimizer,
            objective=objective,
            unroll_steps=checked_steps(unroll_steps),
            stop_gradient=stop_gradient,
            average=average,
            checkpoint=checkpoint,
            project=project,
            sync=averages,
            _group=group,
            _code=Code() if compile else None,
            _parts=(module, summands(objective)),
            _recomputes={},
            _still=frozenset(),
        )
        self._moving(dict(module.named_parameters()), held)

    discriminator: nn.Module
    optimizer: Any
    objective: Objective
    unroll_steps: int
    stop_gradient: bool
    average: bool
    checkpoint: bool
    project: Project | None
    sync: bool
    _group: Any
    _code: Code | None
    _parts: tuple[nn.Module, list[Objective]]  # what is preserved: D, summands of the objective
    _recomputes: dict[Any, bool]  # whether D checkpoints activations; by its form, once inspected
    _still: frozenset[str]  # names of D's parameters that the optimizer holds and that are frozen

    def __setattr__(self, name: str, value: object) -> None:
        """Assign K, or what ``nn.Module`` and its tools keep on a module; refuse the rest."""
        if name == "unroll_steps":
            value = checked_steps(value)
        elif not (name.startswith("_") or name == "training"):
            raise AttributeError(
                f"{name}: cannot be assigned, of a loss only unroll_steps can; got {value!r}. Make "
                "a new UnrolledGeneratorLoss, which costs nothing, or check the spelling."
            )
        object.__setattr__(self, name, value)

    @_outside_compiled_code
    def forward(
        self,
        fake: Batch,
        real: Batch,
        *,
        minibatches: Iterable[Pair] | None = None,
        optimizer_state: Any = None,
    ) -> Tensor:
        """Return f_K (Eq. 9), a 0-d tensor that is differentiable in ``fake``.

        Args:
            fake: Generated samples with the generator's graph: a tensor ``(N, ...)`` for ``D(x)``,
                a tuple for ``D(*x)`` or a mapping for ``D(**x)``.
            real: Real samples, in the same form.
            minibatches: K pairs ``(fake_k, real_k)``, one for each look-ahead step; f itself uses
                ``(fake, real)``. Exactly K are drawn, before the first step. Default:
                ``(fake, real)`` in every step, as in the paper's experiments.
            optimizer_state: Only with a bare transformation: what its ``init`` returned for
                ``tuple(discriminator.parameters())``, or an update of that. Default: afresh.

        Returns:
            f_K, of the dtype of the objective's loss.

        Raises:
            ValueError: ``fake`` has no path to a generator while gradients are on, ``minibatches``
                holds fewer than K pairs, or a loss is not 0-d or not a function of D.
            RuntimeError: Called in inference mode, D changes its parameters in place, a layer has
                no second derivative, or with ``sync`` the ranks disagree on K.
        """
        differentiable = torch.is_grad_enabled() and not self.stop_gradient
        pairs = self._pairs(fake, real, minibatches, differentiable=differentiable)
        with self._preserved():
            points, value = self._look_ahead((fake, real), pairs, optimizer_state)
            return surrogate(value, points, (fake, real))

    @_outside_compiled_code
    def unroll(
        self,
        fake: Batch,
        real: Batch,
        *,
        minibatches: Iterable[Pair] | None = None,
        optimizer_state: Any = None,
    ) -> UnrolledDiscriminator:
        """Return the discriminator after K steps (Eq. 6-7), without touching the real one.

        Args:
            fake: As for :meth:`forward`, but it may be detached; the result then consists of
                constants.
            real: Real samples, in the same form.
            minibatches: As for :meth:`forward`.
            optimizer_state: As for :meth:`forward`.

        Returns:
            D at theta_D^K, with its parameters, buffers, optimizer state and losses. ``average``
            does not matter.

        Raises:
            ValueError: As :meth:`forward`, except for detached fakes.
            RuntimeError: As :meth:`forward`.
        """
        pairs = self._pairs(fake, real, minibatches, differentiable=False)
        with self._preserved():
            game, point = self._start(optimizer_state)
            losses = []
            for point in self._steps(game, point, (fake, real), pairs):
                losses.append(point.loss)
        in_graph = any(t.requires_grad for t in tensors(pairs)) and not self._constant
        keep = _unchanged if in_graph else _detached
        nothing = next(iter(point.parameters.values())).new_empty(0)
        return UnrolledDiscriminator(
            parameters={name: keep(p) for name, p in point.parameters.items()},
            buffers={name: b.detach().clone() for name, b in point.buffers.items()},
            optimizer_state=tree_map(keep, game.optimizer.export(point.optimizer_state)),
            losses=torch.stack(losses) if losses else nothing,
            _module=self.discriminator,
        )

    def _look_ahead(
        self, batch: Pair, pairs: Sequence[Pair], optimizer_state: Any = None
    ) -> tuple[Sequence[Point], Value]:
        """Return theta_D^K, or theta_D^1..K with ``average``, and f; D must be preserved."""
        if not pairs and optimizer_state is None:  # f_0 needs no optimizer
            return self._no_step(batch)
        game, point = self._start(optimizer_state)
        ahead = self._steps(game, point, batch, pairs)
        points = deque(ahead, maxlen=None if self.average else 1) or [point]
        value = generator_value(game.discriminator, self.objective)
        if self.average and self.checkpoint:
            value = checkpointed(value, *self._parts)
        return points, value

    def _start(self, optimizer_state: Any) -> tuple[Game, Point]:
        """Return the game as it stands, and theta_D^0."""
        d = Functional(self.discriminator)
        optimizer = inner_optimizer(self.optimizer, d.parameters, optimizer_state)
        moving = self._moving(d.parameters, optimizer.names)
        transforms = (partial(averaged, group=self._group),) if self.sync else ()
        game = Game(d, optimizer, self.objective, moving, transforms, self.project)
        return game, start(d, optimizer.initial_state())

    def _steps(
        self, game: Game, point: Point, batch: Pair, pairs: Sequence[Pair]
    ) -> Iterator[Point]:
        """Yield theta_D^1..K, by a step in the modes that are set."""
        step = inner_step(game)
        self._inspect_once(game, step, point, batch, pairs)
        if self._code is not None:
            step = self._code.step(step, game)
        if self._constant:
            step = without_graph(step)
        elif self.checkpoint:
            step = checkpointed(step, *self._parts)
        with recomputation_refused():
            yield from look_ahead(step, point, pairs, game.optimizer.settings)

    def _no_step(self, batch: Pair) -> tuple[Sequence[Point], Value]:
        """Return theta_D^0 and f: the ordinary generator loss."""
        d = Functional(self.discriminator)
        point, value = start(d), generator_value(d, self.objective)
        if not torch.is_grad_enabled():
            return [point], value
        form = tuple(d.layers)
        if form not in self._recomputes:
            with self._leaving_nothing_behind():
                self._recomputes[form] = recomputes(self.discriminator, value, point, batch)
        return [point], evaluated(d, self.objective) if self._recomputes[form] else value

    def _inspect_once(
        self, game: Game, step: Step, point: Point, batch: Pair, pairs: Sequence[Pair]
    ) -> None:
        """Look for what would go wrong, once for every form that D takes: layers, modes, freezing.

        It costs a step, and as many as three with ``checkpoint``.
        """
        form = (tuple(game.discriminator.layers), game.moving, self._constant)
        differentiable = any(t.requires_grad for t in tensors((batch, pairs[:1])))
        if not (torch.is_grad_enabled() and differentiable and pairs) or form in self._recomputes:
            return
        value = generator_value(game.discriminator, self.objective)
        with self._leaving_nothing_behind():
            given = (point, pairs[0], game.optimizer.settings)
            if not self._constant:
                with recomputation_refused():
                    point = inspect_step(game, point, pairs[0])
                if self.checkpoint:
                    refuse_unrepeatable(step, *self._parts, given)
            inspect_value(self.discriminator, value, point, batch)
            if self.checkpoint and self.average and not self._constant:
                refuse_unrepeatable(value, *self._parts, (point, batch))
        self._recomputes[form] = False

    @contextmanager
    def _leaving_nothing_behind(self) -> Iterator[None]:
        device = next(self.discriminator.parameters()).device
        with replayed(random_state(device), device), self._preserved():
            yield

    def _preserved(self) -> AbstractContextManager[None]:
        return preserved(*self._parts)

    @property
    def _constant(self) -> bool:
        """Whether theta_D^1..K are constants: no second term in Eq. 12."""
        return self.stop_gradient or not torch.is_grad_enabled()

    def _moving(self, parameters: Mapping[str, Tensor], held: Iterable[str]) -> frozenset[str]:
        """Return the names of the parameters that take steps: held by the optimizer, not frozen.

        A loop may freeze all of D for its G step: then those move that did before.
        """
        held = [name for name in held if parameters[name].is_floating_point()]
        still = frozenset(name for name in held if not parameters[name].requires_grad)
        if len(still) < len(held):
            self._still = still
        return frozenset(held) - self._still

    def _pairs(
        self, fake: Batch, real: Batch, minibatches: Iterable[Pair] | None, *, differentiable: bool
    ) -> list[Pair]:
        """Return what the K steps see, all of it, before the first; refuse detached fakes."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "UnrolledGeneratorLoss: the look-ahead differentiates and so cannot run in "
                "torch.inference_mode(). Use torch.no_grad() for a value without a graph."
            )

        def drawn() -> list[Pair]:
            if differentiable:
                check_differentiable(fake, "fake")
            if minibatches is None:
                return [(fake, real)] * self.unroll_steps
            pairs = drawn_minibatches(minibatches, self.unroll_steps)
            for k, (fake_k, _) in enumerate(pairs) if differentiable else ():
                check_differentiable(fake_k, f"minibatches, fake {k}")
            return pairs

        if not self.sync:
            return drawn()
        settings = {"a graph is needed": not self._constant, "checkpoint": self.checkpoint}
        device = next(self.discriminator.parameters()).device
        return agreed(drawn, settings, device, self._group)

    def extra_repr(self) -> str:
        """Return the settings, for ``print``."""
        return (
            f"{type(self.discriminator).__name__}, {type(self.optimizer).__name__}, "
            f"{self.objective}, unroll_steps={self.unroll_steps}, "
            f"stop_gradient={self.stop_gradient}, average={self.average}, "
            f"checkpoint={self.checkpoint}, compile={self._code is not None}, sync={self.sync}"
        )


def _unchanged(tensor: Any) -> Any:
    return tensor


def _detached(tensor: Any) -> Any:
    return tensor.detach() if isinstance(tensor, Tensor) else tensor
