"""Random games against a naive loop: ``python -m tests.fuzz --examples 2000 --seed 0 --record``.

A case draws D as a small graph of layers, the optimizer and the real steps that it has taken, the
objective and every option of the loss. The reference spells out the layers, the losses and the
optimizer (``torchopt``'s transformations are its own, in a plain loop) and works in float64.

Equal means equal to round-off, which a game may amplify (Adam at gradients near its ``eps``, say).
How much is measured with the reference alone: its inputs, parameters, activations and gradients
are disturbed at the last digit of the case's precision.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hypothesis
import torch
import torchopt
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode
from torchopt.base import GradientTransformation

import unroll
from tests import games, players
from tests.composite import LEAVES, WIDTH, Block, Composite, build, leaves
from tests.oracles import Game, Step, root, textbook, transformed
from tests.settings import DEVICE
from tests.snapshot import changes, snapshot

RECORDS = Path(__file__).resolve().parents[1] / "docs" / "results" / "fuzz.csv"
OPTIMIZERS = {
    name: build
    for name, build in (players.OPTIMIZERS | games.OPTIMIZERS).items()
    if "Adafactor" not in name and "Muon" not in name  # sums over a tensor: not spelled out
}
ROUND_OFF = 100.0  # allowed, in units of the last digit and of what disturbing it does
HOPELESS = 1e-2  # a disturbance so large leaves nothing to compare

Parameters = dict[str, Tensor]


def _clip(theta: Mapping[str, Tensor]) -> Parameters:
    return {name: p.clamp(-0.2, 0.2) for name, p in theta.items()}


def _shrink(theta: Mapping[str, Tensor]) -> Parameters:
    return {name: p / (1 + 0.1 * p.square().sum()) for name, p in theta.items()}


PROJECTIONS = {"clip": _clip, "shrink": _shrink}


@dataclass(frozen=True)
class Case:
    """One game and one call of the loss."""

    block: Block = ("tanh",)
    optimizer: str = "torch SGD"
    objective: str = "minimax"
    unroll_steps: int = 2
    fakes: int = 3
    reals: int = 3
    dtype: torch.dtype = torch.float64
    average: bool = False
    stop_gradient: bool = False
    resampled: bool = False
    real_in_graph: bool = False
    frozen: str = "none"  # or "first", "head", "all", or "after": during the generator's step
    part: bool = False  # whether the optimizer holds D's last layer alone
    warm: int = 0  # real steps of D
    project: str = "none"
    evaluated: bool = False
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case that makes sense."""
    joins = lambda inner: st.one_of(  # noqa: E731
        st.tuples(st.just("then"), inner, inner),
        st.tuples(st.just("residual"), inner),
        st.tuples(st.just("twice"), inner),
        st.tuples(st.just("concatenation"), inner, inner),
    )
    blocks = st.recursive(st.tuples(st.sampled_from(list(LEAVES))), joins, max_leaves=4)
    block = ("then", *draw(st.lists(blocks, min_size=1, max_size=3)))
    optimizer = draw(st.sampled_from(list(OPTIMIZERS)))
    objective = draw(st.sampled_from(list(games.OBJECTIVES)))
    batch = st.integers(2 if "batch norm" in leaves(block) else 1, 7)
    fakes, reals = draw(batch), draw(batch)
    frozen = draw(st.sampled_from(["none", "none", "first", "head", "all", "after"]))
    warm = draw(st.integers(0, 3))
    if "Meta" in optimizer and "tied" in leaves(block):
        optimizer = "torch Adam"  # refused: torchopt's would untie them
    torchs = "torch.optim" in type(OPTIMIZERS[optimizer](nn.Linear(1, 1))).__module__
    if frozen == "all" or (frozen in ("first", "head") and not torchs):
        warm = 0  # their own steps need a gradient of every parameter
    fused = "+" in objective and any("attention" in name for name in leaves(block))
    return Case(
        block=block,
        optimizer=optimizer,
        objective=objective,
        unroll_steps=draw(st.sampled_from([3, 2, 4, 1, 0])),
        fakes=fakes,
        reals=fakes if "pairing" in objective or "gp" in objective else reals,
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        average=draw(st.booleans()),
        # A constant look-ahead runs the fused kernel, which knows no penalty: see test_fuzz.py.
        stop_gradient=not fused and draw(st.sampled_from([False, False, False, True])),
        resampled=draw(st.booleans()),
        real_in_graph=draw(st.booleans()),
        frozen=frozen,
        part=frozen in ("none", "after") and draw(st.sampled_from([False, False, True])),
        warm=warm,
        project=draw(st.sampled_from(["none", "none", "none", *PROJECTIONS])),
        evaluated=draw(st.sampled_from([False, False, True])),
        seed=draw(st.integers(0, 2**16)),
    )


class Played:
    """A case played with the library, and what a reference needs to play it again."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(case.seed)
        ends = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.d = nn.Sequential(ends[0], build(case.block), ends[1]).to(DEVICE, case.dtype)
        self.d.train(not case.evaluated)
        frozen = {"first": self.d[0], "head": self.d[2], "all": self.d}.get(case.frozen)
        if frozen is not None:
            frozen.requires_grad_(False)
        trainable = {name for name, p in self.d.named_parameters() if p.requires_grad}
        own = self.d[2] if case.part else self.d
        self.optimizer = OPTIMIZERS[case.optimizer](own)
        if isinstance(self.optimizer, (GradientTransformation, torchopt.FuncOptimizer)):
            own = self.d
        held = {id(p) for p in own.parameters()}
        self.moving = {
            name
            for name, p in self.d.named_parameters()
            if id(p) in held and (name in trainable or not trainable)
        }
        self.objective = games.OBJECTIVES[case.objective]
        self.loss = unroll.UnrolledGeneratorLoss(
            self.d,
            self.optimizer,
            self.objective,
            unroll_steps=case.unroll_steps,
            stop_gradient=case.stop_gradient,
            average=case.average,
            project=PROJECTIONS.get(case.project),
        )
        self.pairs = [self._pair(k) for k in range(case.unroll_steps * case.resampled + 1)]
        self.history: list[tuple[Parameters, Parameters, Tensor, Tensor]] = []
        self.arguments: dict[str, Any] = {}
        self._warm_up()
        if case.frozen == "after":
            self.d.requires_grad_(False)

    def _pair(self, k: int) -> tuple[Tensor, Tensor]:
        shapes = (self.case.fakes + k, 4), (self.case.reals + k, 4)
        fake, real = (torch.randn(*s, device=DEVICE, dtype=self.case.dtype) for s in shapes)
        return fake, 0.7 * real + 0.5

    def _warm_up(self) -> None:
        """Take real steps of D, its power iterations standing still."""
        spectral = [m for m in self.d.modules() if isinstance(m, _SpectralNorm)]
        hooks = [h for m in self.d.modules() for h in m._forward_pre_hooks.values()]
        for module in spectral:
            module.eval()
        for hook in (h for h in hooks if isinstance(h, SpectralNorm)):
            hook.n_power_iterations = 0
        bare = isinstance(self.optimizer, GradientTransformation)
        state: Any = None
        for k in range(self.case.warm):
            fake, real = self._pair(k)
            self.history.append((*self.standing(), fake.double(), real.double()))
            torch.manual_seed(self.case.seed + k)
            with sdpa_kernel(SDPBackend.MATH):  # the others cannot do R1 in a real step
                loss = self.objective.discriminator_loss(players.called(self.d), fake, real)
                if bare:
                    state = self._bare_step(loss, state)
                else:
                    players.step(self.d, self.optimizer, loss)
        if bare and state is not None:
            self.arguments["optimizer_state"] = state
        for module in spectral:
            module.train(not self.case.evaluated)
        for hook in (h for h in hooks if isinstance(h, SpectralNorm)):
            hook.n_power_iterations = 1

    def _bare_step(self, loss: Tensor, state: Any) -> Any:
        theta = tuple(self.d.parameters())
        state = self.optimizer.init(theta) if state is None else state
        gradients = torch.autograd.grad(loss, theta, allow_unused=True)
        updates, state = self.optimizer.update(gradients, state, params=theta, inplace=False)
        with torch.no_grad():
            moved = torchopt.apply_updates(theta, updates, inplace=False)
            for p, value in zip(theta, moved, strict=True):
                p.copy_(value)
        return state

    def standing(self) -> tuple[Parameters, Parameters]:
        """Return copies of D's parameters and buffers, in float64."""
        named = (self.d.named_parameters(), self.d.named_buffers())
        theta, buffers = ({n: _double(t).detach().clone() for n, t in part} for part in named)
        return theta, buffers

    def call(self) -> tuple[Tensor, list[Tensor]]:
        """Return f_K and its gradients; nothing that the user holds may change."""
        sources = [(fake / 2).requires_grad_() for fake, _ in self.pairs]
        two = torch.full_like(sources[0][:1], 2.0)
        fakes = [two * source for source in sources]
        before = [fake.detach().clone() for fake in fakes]
        reals = [real.clone().requires_grad_(self.case.real_in_graph) for _, real in self.pairs]
        held = snapshot(self.d, self.optimizer, self.arguments)
        rest = zip(fakes[1:], reals[1:], strict=True) if self.case.resampled else None
        torch.manual_seed(self.case.seed)
        value = self.loss(fakes[0], reals[0], minibatches=rest, **self.arguments)
        inputs = fakes + reals * self.case.real_in_graph
        found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        changed = changes(held, self.d, self.optimizer, self.arguments)
        assert not changed, f"the call changed {changed}"
        assert all(map(torch.equal, fakes, before)), "the call changed the fakes"
        torch.autograd.backward([fake.sum() for fake in fakes])  # their graph is still there
        assert all(torch.equal(cast(Tensor, s.grad), torch.full_like(s, 2)) for s in sources)
        return value.detach(), list(found)


class _Roots(TorchFunctionMode):
    """Torchopt's optimizers have no slope at a zero second moment; the convention is 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        roots = (torch.sqrt, Tensor.sqrt, Tensor.sqrt_)
        return root(args[0]) if func in roots else func(*args, **kwargs or {})


class Reference:
    """The same case by the naive loop, disturbed by ``noise`` at every turn."""

    def __init__(self, played: Played, noise: float = 0.0, seed: int = 0) -> None:
        self.played, self.case, self.noise = played, played.case, noise
        self.source = torch.Generator().manual_seed(seed)
        self.game = Game(played.objective, self.case.dtype)
        optimizer = OPTIMIZERS[self.case.optimizer](
            played.d[2] if isinstance(played.optimizer, torch.optim.Optimizer) and self.case.part
            else played.d if isinstance(played.optimizer, torch.optim.Optimizer)
            else nn.Linear(1, 1)
        )  # fmt: skip
        self.step = (
            textbook(optimizer, dict(played.d.named_parameters()))
            if isinstance(optimizer, torch.optim.Optimizer)
            else _among(transformed(getattr(optimizer, "impl", optimizer)))
        )

    def disturbed(self, tensor: Tensor) -> Tensor:
        """Return a tensor whose last digit has changed."""
        if not self.noise:
            return tensor
        draw = torch.randn(tensor.shape, generator=self.source, dtype=torch.float64)
        return tensor * (1 + self.noise * draw.to(tensor.device))

    def at(self, theta: Parameters, buffers: Parameters) -> Composite:
        """Return D at other parameters and buffers."""
        return Composite(self.played.d, theta, buffers, self.case.dtype, self.disturbed)

    def gradients(
        self, theta: Parameters, buffers: Parameters, fake: Tensor, real: Tensor
    ) -> tuple[Parameters, Parameters]:
        """Return D's gradients, and the buffers that its forward passes leave."""
        d = self.at(theta, buffers)
        loss = self.game.discriminator_loss(d, fake, real)
        moving = {n: p for n, p in theta.items() if n in self.played.moving}
        found = torch.autograd.grad(
            loss, list(moving.values()), create_graph=True, allow_unused=True
        )
        g = {n: f for n, f in zip(moving, found, strict=True) if f is not None}
        if self.noise:  # linear in the gradients, so that their derivatives are disturbed too
            signs = {n: torch.randn(f.shape, generator=self.source).to(f) for n, f in g.items()}
            total = torch.stack([(f * signs[n]).sum() for n, f in g.items()]).sum()
            g = {n: f + self.noise * total * signs[n].roll(1) for n, f in g.items()}
        return g, d.buffers

    def leaves(self, theta: Parameters) -> Parameters:
        """Return constants to differentiate in."""
        return {n: p.detach().requires_grad_(n in self.played.moving) for n, p in theta.items()}

    def play(self) -> tuple[Tensor, list[Tensor]]:
        """Return f_K and its gradients."""
        case, state = self.case, None
        for k, (theta, buffers, fake, real) in enumerate(self.played.history):
            torch.manual_seed(case.seed + k)
            g, _ = self.gradients(self.leaves(theta), buffers, fake, real)
            with torch.no_grad():
                _, state = self.step(theta, g, state)
        pairs = [
            tuple(self.disturbed(t.double().clone()).requires_grad_() for t in pair)
            for pair in self.played.pairs
        ]
        theta, buffers = self.played.standing()
        theta = self.leaves({n: self.disturbed(p) for n, p in theta.items()})
        points = [({n: p.detach() for n, p in theta.items()}, buffers)]
        torch.manual_seed(case.seed)
        for k in range(case.unroll_steps):
            fake, real = pairs[k + 1 if case.resampled else 0]
            if case.stop_gradient:
                fake, real, theta = fake.detach(), real.detach(), self.leaves(theta)
            g, buffers = self.gradients(theta, buffers, fake, real)
            with _Roots():
                theta, state = self.step(theta, g, state)
            theta = PROJECTIONS.get(case.project, dict)(theta)
            if case.stop_gradient:
                theta = {n: p.detach() for n, p in theta.items()}
            points.append((theta, buffers))
        points = points[1:] if case.average and case.unroll_steps else points[-1:]
        values = [self.game.generator_loss(self.at(*point), *pairs[0]) for point in points]
        value = torch.stack(values).mean()
        fakes, reals = zip(*pairs, strict=True)
        inputs = [*fakes, *reals * case.real_in_graph]
        found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        return value.detach(), list(found)


def _among(step: Step) -> Step:
    """Return the step for some of the parameters: those that have a gradient."""

    def some(theta: Parameters, g: Parameters, state: Any) -> tuple[Parameters, Any]:
        moved, state = step({n: theta[n] for n in g}, g, state)
        return theta | moved, state

    return some


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def distance(got: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> float:
    """Return the largest deviation of value and gradients, relative to the largest of each."""
    scale = max([1e-6, *(g.abs().max().item() for g in wanted[1])])
    errors = [(a.double() - b).abs().max() / scale for a, b in zip(got[1], wanted[1], strict=True)]
    errors.append((got[0].double() - wanted[0]).abs() / wanted[0].abs().clamp_min(0.1))
    return torch.stack(errors).max().item()  # NaN if one is


@dataclass(frozen=True)
class Outcome:
    """How a case went: its relative error, and how large round-off may be."""

    kind: str  # "compared" or "ill-conditioned"
    error: float = 0.0
    allowed: float = 1.0


def check(case: Case) -> Outcome:
    """Play a case and its reference; raise if they differ, or if anything was changed."""
    played = Played(case)
    got, wanted = played.call(), Reference(played).play()
    noise, largest = torch.finfo(case.dtype).eps, torch.finfo(case.dtype).max
    if not all(bool((t.abs() < largest).all()) for t in (wanted[0], *wanted[1])):
        return Outcome("ill-conditioned")  # the game leaves the range of its type
    error, allowed = distance(got, wanted), ROUND_OFF * noise
    if not error <= allowed:
        disturbed = [Reference(played, noise, seed).play() for seed in range(3)]
        sensitivity = max(distance(values, wanted) for values in disturbed)
        if not sensitivity < HOPELESS:
            return Outcome("ill-conditioned")
        allowed += ROUND_OFF * sensitivity
    assert error <= allowed, f"off by {error:.1e}, where {allowed:.1e} is round-off"
    return Outcome("compared", error, allowed)


def run(examples: int, seed: int) -> tuple[list[tuple[Case, Outcome]], list[tuple[Case, str]]]:
    """Check so many cases; return how they went, and the failures with what was wrong."""
    outcomes, failures = [], []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases())
    def property(case: Case) -> None:
        try:
            outcomes.append((case, check(case)))
        except Exception as error:  # every one is a failure, and the run goes on
            failures.append((case, f"{type(error).__name__}: {error}"))

    property()
    return outcomes, failures


def record(row: Mapping[str, object]) -> None:
    """Append a row to the results."""
    new = not RECORDS.exists()
    with RECORDS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def revision() -> str:
    """Return the commit; one with changed sources ends in "+"."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    commands = (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--", "unroll"])
    try:
        commit, changed = (
            subprocess.run([*git, *c], capture_output=True, text=True, check=True).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+" * bool(changed)


def main() -> int:
    """Run the fuzz at scale."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help=f"append a row to {RECORDS.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "optimizer: holds no")  # some cases train D's last layer
    commit, start = revision(), time.monotonic()
    outcomes, failures = run(arguments.examples, arguments.seed)
    kinds = Counter(outcome.kind for _, outcome in outcomes)
    row: dict[str, object] = {
        "examples": len(outcomes) + len(failures),
        "seed": arguments.seed,
        "failures": len(failures),
        "compared": kinds["compared"],
        "refused": kinds["refused"],  # none since norms under a penalty are right
        "ill_conditioned": kinds["ill-conditioned"],
    }
    for dtype in (torch.float64, torch.float32):
        found = [o for case, o in outcomes if case.dtype == dtype and o.kind == "compared"]
        name = str(dtype).removeprefix("torch.")
        row[f"worst_error_{name}"] = f"{max((o.error for o in found), default=0.0):.2e}"
        share = max((o.error / o.allowed for o in found), default=0.0)
        row[f"worst_share_of_round_off_{name}"] = f"{share:.3f}"
    row |= {
        "optimizers": len({case.optimizer for case, _ in outcomes}),
        "layers": len(set().union(*(leaves(case.block) for case, _ in outcomes))),
        "seconds": round(time.monotonic() - start, 1),
        "torch": torch.__version__,
        "revision": commit,
    }
    for case, message in failures:
        print(f"{message}\n    {case}")
    print("\n".join(f"{key}: {value}" for key, value in row.items()))
    if arguments.record:
        record(row)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
