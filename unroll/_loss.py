"""The surrogate generator loss f_K, Eq. 9."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from unroll._autograd_fixes import recomputation_refused
from unroll._functional import Batch, Functional, Pair, preserved, tensors
from unroll._inspection import Inspection
from unroll._look_ahead import (
    Game,
    Point,
    Value,
    generator_value,
    inner_step,
    look_ahead,
    one_step,
    start,
    surrogate,
    training_loss,
    without_graph,
)
from unroll._modes.checkpointed import checkpointed
from unroll._modes.compiled import Code
from unroll._modes.distributed import Ranks, agreed, averaged, resolved_sync
from unroll._modes.evaluated import evaluated
from unroll._objectives import Minimax, Objective
from unroll._optimizers import Moving, inner_optimizer
from unroll._unrolled_discriminator import UnrolledDiscriminator, unrolled
from unroll._validation import Mapped, assignable, checked_arguments, drawn, outside_compiled_code


class UnrolledGeneratorLoss(nn.Module):
    """The generator's loss at a discriminator that looks K steps ahead.

    The surrogate objective of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
    Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163)::

        theta_D^0     = theta_D                                              (6)
        theta_D^{k+1} = theta_D^k + eta df(theta_G, theta_D^k)/dtheta_D^k        (7)
        f_K(theta_G, theta_D) = f(theta_G, theta_D^K(theta_G, theta_D))          (9)

    with a step of the given optimizer in place of ``eta df``. The steps are differentiated
    through, so that the generator learns how D would react to it. Nothing that the caller holds
    changes: D, its buffers and gradients, the optimizer and its state. Time and memory grow with K.

    Args:
        discriminator: Any ``nn.Module``; ``torch.compile``, data parallelism or Fabric may wrap it.
        optimizer: What trains the discriminator, as it is: a ``torch.optim`` optimizer, a torchopt
            ``Optimizer``, ``MetaOptimizer`` or ``FuncOptimizer`` (each with its live state), or a
            bare torchopt transformation, which starts afresh at every call unless that gets
            ``optimizer_state``; or a list of optimizers, stepped in that order.
        objective: The game, see :class:`unroll.Objective`. Default: :class:`unroll.Minimax`.
        unroll_steps: K, at least 0 (the ordinary generator loss). It may be assigned later.
        stop_gradient: Keep the first term of Eq. 12 only: theta_D^K is a constant. Default False.
        average: Return the mean of f_1..f_K (App. B.2), or f_0 where K = 0. Default False.
        checkpoint: Keep only what each step starts from, and compute the step again in the backward
            pass: activations of one step whatever K is. f_K is then differentiable once, and D and
            the objective must be the same in both runs, or an error says so. Default False.
        compile: Run the steps as code that ``torch.compile`` makes of one step and its adjoint, for
            all K alike; f_K is then differentiable once. The first call takes 10 to 60 s. What is
            not compiled runs eagerly, after a warning. Default False.
        transform_gradients: Applied to the gradients of every step, after hooks and the mean over
            ranks (:class:`unroll.ClipGradNorm`, :class:`unroll.ClipGradValue`): a function from a
            mapping of names to tensors to one alike, differentiated through. Default: none.
        project: Applied after every step (WGAN's clipping, a weight normalisation): like
            ``transform_gradients``, but of parameters. Default: none.
        sync: Average D's gradients over all ranks of ``torch.distributed`` in every step: one game
            over the global batch (for means over samples and equal batches; BatchNorm stays that of
            a rank). Default None: where D is wrapped in DistributedDataParallel; wrap G, too.

    Raises:
        TypeError: An argument is of an unsupported type.
        ValueError: An argument is of an unsupported value, as each message says.

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
        transform_gradients: Mapped | None = None,
        project: Mapped | None = None,
        sync: bool | None = None,
    ) -> None:
        super().__init__()
        parts = checked_arguments(discriminator, objective, transform_gradients, project)
        averages, ranks = resolved_sync(discriminator, parts[0], sync)
        # Not as attributes of an nn.Module: D would become a submodule of its loss.
        vars(self).update(
            discriminator=parts[0],
            optimizer=optimizer,
            objective=objective,
            unroll_steps=assignable("unroll_steps", unroll_steps),
            stop_gradient=stop_gradient,
            average=average,
            checkpoint=checkpoint,
            transform_gradients=transform_gradients,
            project=project,
            sync=averages,
            _given=discriminator,
            _ranks=ranks,
            _parts=parts,
            _last=SimpleNamespace(losses=[]),
            _code=Code() if compile else None,
            _inspection=Inspection(parts, stop_gradient, checkpoint, average),
            _moving=Moving(),
        )
        self._start(None)

    __call__: Callable[..., Tensor]  # nn.Module's says Any
    discriminator: nn.Module
    optimizer: Any
    objective: Objective
    unroll_steps: int
    stop_gradient: bool
    average: bool
    checkpoint: bool
    transform_gradients: Mapped | None
    project: Mapped | None
    sync: bool
    _given: nn.Module  # D in its wrappers
    _ranks: Ranks
    _code: Code | None
    _parts: tuple[nn.Module, list[Any]]  # what is preserved: D, the objective's summands, functions
    _inspection: Inspection
    _moving: Moving
    _last: SimpleNamespace  # what the last call found

    def __setattr__(self, name: str, value: object) -> None:
        """Assign K, or what ``nn.Module`` and its tools keep on a module; refuse the rest."""
        object.__setattr__(self, name, assignable(name, value))

    @outside_compiled_code
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
            minibatches: K pairs ``(fake_k, real_k)``, one a step, drawn before the first; f itself
                uses ``(fake, real)``. Default: ``(fake, real)`` in every step, as in the paper.
            optimizer_state: Only with a bare transformation: what its ``init`` returned for
                ``tuple(discriminator.parameters())``, or an update of that. Default: afresh.

        Returns:
            f_K, of the dtype of the objective's loss.

        Raises:
            ValueError: ``fake`` has no path to a generator while gradients are on, ``minibatches``
                holds fewer than K pairs, or a loss is not 0-d or not a function of D.
            RuntimeError: In inference mode, where D changes its parameters in place, keeps them
                where the look-ahead does not reach or lacks a derivative, where the optimizer
                trains what is not in D, or where the ranks disagree on K.
        """
        batch = fake, real
        pairs = self._pairs(batch, minibatches, differentiable=not self._constant)
        with preserved(*self._parts):
            points, value = self._points(batch, pairs, optimizer_state)
            return surrogate(value, points, batch)

    @outside_compiled_code
    def unroll(
        self,
        fake: Batch,
        real: Batch,
        *,
        minibatches: Iterable[Pair] | None = None,
        optimizer_state: Any = None,
    ) -> UnrolledDiscriminator:
        """Return the discriminator after K steps (Eq. 6-7), without touching the real one.

        The arguments are those of :meth:`forward`, but ``fake`` may be detached: the result then
        consists of constants. ``average`` does not matter.

        Returns:
            D at theta_D^K, with its parameters, buffers, optimizer state and losses.

        Raises:
            ValueError: As :meth:`forward`, except for detached fakes.
            RuntimeError: As :meth:`forward`.
        """
        batch = fake, real
        pairs = self._pairs(batch, minibatches, differentiable=False)
        with preserved(*self._parts):
            game, point = self._start(optimizer_state)
            (point, *_), losses = self._steps(game, point, batch, pairs)
        in_graph = any(t.requires_grad for t in tensors(pairs)) and not self._constant
        return unrolled(game, point, losses, in_graph=in_graph)

    def discriminator_loss(self, fake: Batch, real: Batch) -> Tensor:
        """Return D's own loss, 0-d, for D's step: what the look-ahead's steps minimise.

        The batches are those of :meth:`forward`. ``fake`` is detached, ``real`` is not: detach what
        an encoder has made of it. D runs in its wrappers, as in any training step: buffers and
        random numbers move. ``project`` and clipping remain the loop's. A loss that is not 0-d is a
        TypeError or ValueError.
        """
        self._moving.see(dict(self.discriminator.named_parameters()))
        return training_loss(self._given, self.discriminator, self.objective, (fake, real))

    @property
    def discriminator_losses(self) -> Tensor:
        """D's loss before each step of the last call of :meth:`forward`: ``(K,)``, detached."""
        return torch.stack(self._last.losses) if self._last.losses else torch.empty(0)

    def _points(
        self, batch: Pair, pairs: Sequence[Pair], optimizer_state: Any = None
    ) -> tuple[Sequence[Point], Value]:
        """Return theta_D^K, or theta_D^1..K with ``average``, and f; D must be preserved."""
        if not pairs and optimizer_state is None:  # the ordinary loss, which needs no optimizer
            self._last.losses = []
            d = Functional(self.discriminator)
            self._moving.see(d.parameters)
            point, value = start(d), generator_value(d, self.objective)
            if torch.is_grad_enabled() and self._inspection.recomputes(d, value, point, batch):
                value = evaluated(d, self.objective)
            return [point], value
        game, point = self._start(optimizer_state)
        points, losses = self._steps(game, point, batch, pairs, every=self.average)
        self._last.losses = losses
        value = generator_value(game.discriminator, self.objective)
        if self.average and self.checkpoint:
            value = checkpointed(torch.enable_grad()(value), *self._parts)
        return points, value

    def _start(self, optimizer_state: Any) -> tuple[Game, Point]:
        """Return the game as it stands, and theta_D^0."""
        d = Functional(self.discriminator)
        optimizer = inner_optimizer(self.optimizer, d.parameters, optimizer_state)
        moving = self._moving.among(self.optimizer, d.parameters, optimizer.names)
        mean = partial(averaged, ranks=self._ranks) if self.sync else None
        functions = mean, self.transform_gradients, self.project
        point = start(d, optimizer.initial_state)
        return Game(d, optimizer, self.objective, moving, *functions), point

    def _steps(
        self, game: Game, point: Point, batch: Pair, pairs: Sequence[Pair], *, every: bool = False
    ) -> tuple[list[Point], list[Tensor]]:
        """Return what :func:`look_ahead` does, by a step in the modes that are set."""
        step, code = inner_step(game), self._code
        ahead = partial(look_ahead, step) if code is None else code.look_ahead(step, game)
        if self._constant:
            ahead = without_graph(ahead)
        elif self.checkpoint:
            ahead = partial(look_ahead, checkpointed(one_step(ahead), *self._parts))
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors((batch, pairs)))
        form = game.discriminator.layers, game.moving, graph
        with recomputation_refused():
            if pairs and form not in self._inspection.searched:
                self._inspection.inspect_steps(game, point, batch, pairs[0], graph=graph)
            return ahead(point, pairs, game.optimizer.settings, every=every)

    def _pairs(
        self, batch: Pair, minibatches: Iterable[Pair] | None, *, differentiable: bool
    ) -> list[Pair]:
        """Return what the K steps see, all of it, before the first."""
        draw = partial(drawn, batch, minibatches, self.unroll_steps, differentiable=differentiable)
        settings = {"a graph is needed": not self._constant, "checkpoint": self.checkpoint}
        return agreed(draw, settings, self.discriminator, self._ranks) if self.sync else draw()

    @property
    def _constant(self) -> bool:
        """Whether theta_D^1..K are constants: no second term in Eq. 12."""
        return self.stop_gradient or not torch.is_grad_enabled()

    def extra_repr(self) -> str:
        """Return the settings, for ``print``."""
        names = ("unroll_steps", "stop_gradient", "average", "checkpoint", "sync")
        options = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        kinds = f"{type(self.discriminator).__name__}, {type(self.optimizer).__name__}"
        return f"{kinds}, {self.objective}, {options}, compile={self._code is not None}"
