"""The correctness matrix: f_K's gradient under every optimizer and discriminator of the tests.

python -m tests.matrix                  compute it; fail if a cell is off by more than 1e-6
python -m tests.matrix --record         write docs/results/{correctness,optimizers}.csv, or go on
python -m tests.matrix --only dropout   only discriminators with that in their name, again
                                        (under another version of torch: rows beside the others)

A cell is the relative error of f_K's gradient in the fakes, with K = 3, along a random direction,
after two real steps, in float64, against Ridders' extrapolated central differences of the value
under ``torch.no_grad()``; or the exception that refuses the pair. Muon, which torch takes in
bfloat16, is taken without rounding there. For every optimizer, its look-ahead is compared with its
real steps, too: Muon's with those in bfloat16.
"""

import argparse
import csv
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchopt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchopt.base import GradientTransformation

from tests.architectures import ARCHITECTURES, Architecture
from tests.games import OPTIMIZERS as GAME_OPTIMIZERS
from tests.oracles import central_difference
from tests.own_rules import MUON, OWN, RULES, SEVERAL, with_muon
from tests.players import OPTIMIZERS as PLAYERS
from tests.players import Build, batches, called, deep, train
from tests.settings import randn
from tests.zoo import ZOO, Animal
from tests.zoo_refused import REFUSED, Refusal
from unroll import ClipGradNorm, ClipGradValue, Objective, UnrolledGeneratorLoss
from unroll._optimizers import group_rules

K, SEED, SAMPLES, BOUND = 3, 0, 5, 1e-6
OPTIMIZERS = PLAYERS | MUON | OWN | SEVERAL
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
Row = dict[str, str]


def _animal(architecture: Architecture) -> Animal:
    """Return a paper's discriminator at the width at which it is checked."""

    def feed(x: Tensor) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return architecture.feed(x, *map(_double, architecture.draw(len(x))))

    build: Callable[[], nn.Module] = lambda: architecture.discriminator(architecture.width)  # noqa: E731
    return Animal(build, (3, 32, 32), feed, architecture.objective)


@dataclass(frozen=True)
class Maximised:
    """A game whose discriminator has an optimizer that maximises."""

    objective: Objective

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        """Return what D maximises."""
        return -self.objective.discriminator_loss(discriminator, fake, real)

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        """Return what G minimises."""
        return self.objective.generator_loss(discriminator, fake, real)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _first(names: Iterable[str], key: Callable[[str], str]) -> list[str]:
    """Return the first name of each key."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(key(name), name)
    return list(found.values())


def public_name(optimizer: Any, name: str) -> str:
    """Return the public name of what an entry of a table builds; of Muon's list, its last one's."""
    if name in SEVERAL:
        return "several.list"
    if isinstance(optimizer, list):
        return public_name(optimizer[-1], name)
    if type(optimizer) in RULES:
        return f"registered.{type(optimizer).__name__}"
    if isinstance(optimizer, GradientTransformation):
        return f"torchopt.{name.split()[0]}"
    module = "torch.optim" if isinstance(optimizer, torch.optim.Optimizer) else "torchopt"
    return f"{module}.{type(optimizer).__name__}"


# All entries of torch.optim, the first of each function of torchopt and of each of its wrappers.
COLUMNS = {
    name: GAME_OPTIMIZERS[name]
    for name in _first(
        GAME_OPTIMIZERS,
        lambda n: (
            n if n.startswith("torch ") else re.sub("(Optimizer|Meta|Func|[a-z]+).*", r"\1", n)
        ),
    )
}
COLUMNS |= OWN | SEVERAL | ({"torch Muon": lambda d: with_muon(d, 0.05)} if MUON else {})
TRANSFORMS: dict[str, Any] = {
    "torch Adam, norm clipped": ClipGradNorm(0.1),
    "torch Adam, values clipped": ClipGradValue(0.05),
}
COLUMNS |= dict.fromkeys(TRANSFORMS, GAME_OPTIMIZERS["torch Adam"])
CLASSES = {name: public_name(build(deep()), name) for name, build in COLUMNS.items()}
CLASSES |= {n: f"transform_gradients.{type(t).__name__}" for n, t in TRANSFORMS.items()}
# The papers' discriminators take a while: one entry of each class of torch.optim, and an Adam.
FEW = [n for n in _first(COLUMNS, CLASSES.__getitem__) if n.startswith("torch ") or n == "adam"]
# Optimizers of torch refuse to be built on lazy parameters or on none, with their own words.
DISCRIMINATORS: dict[str, Animal | Refusal] = {
    **{name: _animal(architecture) for name, architecture in ARCHITECTURES.items()},
    **ZOO,
    **{name: refusal for name, refusal in REFUSED.items() if name not in ("lazy", "no parameters")},
}


# Factors of learning rates at which f_K is smooth: with the zoo's, SNGAN's hinge saturates, and
# SGD leaves BatchNorm with a gradient inside at values that are chaotic in the fakes.
TAMED = dict.fromkeys(ARCHITECTURES, 0.003) | {"BatchNorm, gradient inside D": 0.1}


def warmed(d: nn.Module, optimizer: Any, pairs: list[Any], objective: Objective) -> dict[str, Any]:
    """Take real steps; return the keyword arguments that carry a bare transformation's state."""
    once = any(isinstance(m, torch._dynamo.OptimizedModule) for m in d.modules())
    if isinstance(optimizer, (torchopt.MetaOptimizer, torchopt.FuncOptimizer)) and (
        once or not all(p.requires_grad for p in d.parameters())
    ):
        return {}  # their own steps fail where D is compiled, or a parameter frozen
    if not isinstance(optimizer, GradientTransformation):
        train(d, optimizer, pairs, objective)
        return {}
    theta = tuple(d.parameters())
    state: Any = optimizer.init(theta)
    for fake, real in pairs:
        loss = objective.discriminator_loss(called(d), fake, real)
        moving = [p for p in theta if p.requires_grad]
        found = iter(torch.autograd.grad(loss, moving, allow_unused=True))
        gradients = tuple(next(found) if p.requires_grad else None for p in theta)
        updates, state = optimizer.update(gradients, state, params=theta, inplace=False)
        moved = torchopt.apply_updates(theta, updates, inplace=False)
        for p, value in zip(theta, moved, strict=True):
            p.data.copy_(value)
    return {"optimizer_state": state}


def tamed(optimizer: Any, d: nn.Module, factor: float) -> Any:
    """Return an optimizer like a fresh one, of ``factor`` times its learning rate."""
    if isinstance(optimizer, list):
        return [tamed(one, d, factor) for one in optimizer]
    if isinstance(optimizer, torch.optim.Optimizer):
        for group in optimizer.param_groups:
            group["lr"] *= factor
        return optimizer
    scale = torchopt.transform.scale(factor)
    if isinstance(optimizer, GradientTransformation):
        return torchopt.chain(optimizer, scale)
    chain = torchopt.chain(optimizer.impl, scale)
    if isinstance(optimizer, torchopt.FuncOptimizer):
        return torchopt.FuncOptimizer(chain)
    if isinstance(optimizer, torchopt.MetaOptimizer):
        return torchopt.MetaOptimizer(d, chain)
    return torchopt.Optimizer(d.parameters(), chain)


def relative_error(optimizer_name: str, discriminator_name: str) -> float:
    """Return how far f_K's gradient is from central differences."""
    animal: Animal | Refusal = DISCRIMINATORS[discriminator_name]
    torch.manual_seed(SEED)
    d = animal.make()
    optimizer, objective = COLUMNS[optimizer_name](d), animal.objective
    samples, step = SAMPLES, 1e-2
    if isinstance(optimizer, torch.optim.Optimizer) and optimizer.defaults.get("maximize"):
        objective = Maximised(objective)
    if (factor := TAMED.get(discriminator_name)) is not None:
        optimizer = tamed(optimizer, d, factor)
    if discriminator_name in ARCHITECTURES:
        samples = 2
        step = 1e-4  # so many ReLUs that f_K jumps within a larger one

    def batch() -> Tensor:
        return randn(samples, *animal.shape)

    fake, real = batch(), animal.feed(batch() + 0.5)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels cannot do R1 in a real step
        pairs = [(animal.feed(batch()), animal.feed(batch() + 0.5)) for _ in range(2)]
        state = {} if isinstance(animal, Refusal) else warmed(d, optimizer, pairs, objective)
    loss = UnrolledGeneratorLoss(
        *(d, optimizer, objective),
        unroll_steps=K,
        transform_gradients=TRANSFORMS.get(optimizer_name),
    )

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(SEED)  # dropout's draws
        value: Tensor = loss(animal.feed(x), real, **state)
        return value

    fake.requires_grad_()
    (gradient,) = torch.autograd.grad(f(fake), fake)
    direction = randn(*fake.shape)

    def along(t: float) -> float:
        return f(fake + t * direction).item()

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        difference = central_difference(along, step, 17, accuracy=1e-8)
        if abs(difference) < 1e-5 * abs(along(0.0)):  # round-off of f_K: only wide steps see it
            difference = central_difference(along, 16 * step, 21, accuracy=1e-8)
    return abs(difference - (gradient * direction).sum().item()) / abs(difference)


def cell(optimizer_name: str, discriminator_name: str) -> Row:
    """Return a row of the record: an error, or what refuses the pair."""
    animal = DISCRIMINATORS[discriminator_name]
    row = {
        "optimizer": optimizer_name,
        "class": CLASSES[optimizer_name],
        "discriminator": discriminator_name,
        "relative_error": "",
        "refusal": "",
    }
    with warnings.catch_warnings(), patch.object(group_rules, "MUON_DTYPE", torch.float64):
        warnings.simplefilter("ignore")
        try:
            row["relative_error"] = f"{relative_error(optimizer_name, discriminator_name):.1e}"
        except Exception as error:
            row["refusal"] = type(error).__name__
            if not (
                isinstance(animal, Refusal)
                and isinstance(error, animal.error)
                and re.search(animal.message, str(error))
            ):
                row["refusal"] = f"unexpected {type(error).__name__}: {error}"
    return row


def wrong(row: Row) -> bool:
    """Return whether a cell is neither exact nor refused by name."""
    if row["refusal"]:
        return row["refusal"].startswith("unexpected")
    return row["discriminator"] in REFUSED or not float(row["relative_error"]) < BOUND


def steps_error(name: str, dtype: torch.dtype) -> float:
    """Return how far 1 and 3 look-ahead steps end from real ones, after 0, 1 and 50 of those."""
    errors: list[float] = []
    for warm in (0, 1, 50):
        torch.manual_seed(SEED)
        d = deep(dtype)
        optimizer = OPTIMIZERS[name](d)
        train(d, optimizer, batches(warm, dtype, seed=1))
        ((fake, real),) = batches(1, dtype)
        ahead = {
            k: UnrolledGeneratorLoss(d, optimizer, unroll_steps=k).unroll(fake, real)
            for k in (1, 3)
        }
        for k in (1, 2, 3):
            train(d, optimizer, [(fake, real)])
            for n, p in d.named_parameters() if k in ahead else ():
                error = (ahead[k].parameters[n] - p).norm() / p.norm()
                errors.append(error.item())
    return max(errors)


def _refused() -> dict[str, Build]:
    clip = torchopt.clip_grad_norm(1.0)
    return {
        "torch.optim.LBFGS": lambda d: torch.optim.LBFGS(d.parameters()),
        "torch.optim.SparseAdam": lambda d: torch.optim.SparseAdam(d.parameters()),
        "torchopt.clip_grad_norm": lambda _: torchopt.chain(clip, torchopt.sgd(0.1)),
        "use_accelerated_op": lambda _: torchopt.adam(0.1, use_accelerated_op=True),
    }


def optimizer_row(name: str) -> Row:
    """Return how exactly the look-ahead takes an optimizer's real steps, or what refuses it."""
    row = {"optimizer": name, "class": name, "float32": "", "float64": "", "refusal": ""}
    if name in _refused():
        d = deep()
        try:
            UnrolledGeneratorLoss(d, _refused()[name](d), unroll_steps=1)
        except (TypeError, ValueError) as error:
            row["refusal"] = type(error).__name__
        return row
    row["class"] = public_name(OPTIMIZERS[name](deep()), name)
    for dtype in (torch.float32, torch.float64):
        row[str(dtype).removeprefix("torch.")] = f"{steps_error(name, dtype):.1e}"
    return row


def inexact(row: Row) -> bool:
    """Return whether an optimizer is neither as its real steps nor refused."""
    if row["refusal"]:
        return False
    return not (float(row["float32"] or "nan") <= 1e-6 and float(row["float64"] or "nan") <= 1e-12)


def _cells(discriminator: str, optimizers: Sequence[str]) -> list[Row]:
    torch.set_num_threads(1)
    return [cell(optimizer, discriminator) for optimizer in optimizers]


def _rows_of_optimizer(name: str) -> list[Row]:
    torch.set_num_threads(1)
    return [optimizer_row(name)]


def versions() -> Row:
    """Return what the numbers depend on; a revision with changed sources ends in "+"."""
    git = ["git", "-C", str(RESULTS)]

    def output(*command: str) -> str:
        return subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout

    dirty = bool(output("status", "--porcelain", "--", ":/unroll", ":/tests").strip())
    revision = output("rev-parse", "--short=10", "HEAD").strip() + "+" * dirty
    settings = {"seed": str(SEED), "unroll_steps": str(K)}
    return settings | {"torch": torch.__version__, "revision": revision}


class Record:
    """A CSV file of rows. They stay while the library has not changed since their revision.

    Rows of other versions of torch stay as they are, beside those of this one. ``keys`` are the
    columns that tell rows apart, ``wanted`` the values that they should have; those that ``fails``
    rejects, or whose first value contains ``only``, are computed again.
    """

    def __init__(
        self,
        path: Path | None,
        keys: tuple[str, ...],
        wanted: Sequence[tuple[str, ...]],
        fails: Callable[[Row], bool],
        only: str = "",
    ) -> None:
        self.path, self.keys, self.versions, self.rows = path, keys, versions(), list[Row]()
        self.order = {key: i for i, key in enumerate(wanted)}
        self.others: list[Row] = []
        if path is not None and path.exists():
            with path.open(newline="") as file:
                found = list(csv.DictReader(file))
            self.others = [row for row in found if row["torch"] != torch.__version__]
            rows = [row for row in found if row["torch"] == torch.__version__]
            rows = [row for row in rows if self.key(row) in self.order]
            kept = {revision for revision in {r["revision"] for r in rows} if _same(revision)}
            again = {key for key in wanted if only and only in key[0]}
            rows = [row for row in rows if row["revision"] in kept and not fails(row)]
            self.rows = [row for row in rows if self.key(row) not in again]
        done = {self.key(row) for row in self.rows}
        self.missing = [key for key in wanted if key not in done and only in key[0]]

    def key(self, row: Row) -> tuple[str, ...]:
        """Return what tells a row from others."""
        return tuple(row[name] for name in self.keys)

    def extend(self, rows: Sequence[Row]) -> None:
        """Add rows, and write."""
        self.rows += [row | self.versions for row in rows]
        self.rows.sort(key=lambda row: self.order[self.key(row)])
        if self.path is not None:
            draft = self.path.with_suffix(".draft")
            with draft.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(sorted([*self.others, *self.rows], key=_torch, reverse=True))
            draft.replace(self.path)


def _torch(row: Mapping[str, Any]) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", row["torch"])[:3]]


def _same(revision: str) -> bool:
    command = ["git", "-C", str(RESULTS), "diff", "--quiet", revision, "HEAD", "--", ":/unroll"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> None:
    """Compute what is missing, and judge everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write to docs/results/")
    parser.add_argument("--only", default="", help="part of a discriminator's name")
    parser.add_argument("--jobs", type=int, default=1, help="processes; at most one a core")
    options = parser.parse_args()
    folder = RESULTS if options.record else None
    grid = [
        (discriminator, optimizer)
        for discriminator in DISCRIMINATORS
        for optimizer in (FEW if discriminator in ARCHITECTURES else COLUMNS)
    ]
    keys = ("discriminator", "optimizer")
    cells = Record(folder and folder / "correctness.csv", keys, grid, wrong, options.only)
    entries = [(name,) for name in [*OPTIMIZERS, *_refused()] if options.record or not options.only]
    parity = Record(folder and folder / "optimizers.csv", ("optimizer",), entries, inexact)
    missing = [(d, [o for _, o in pairs]) for d, pairs in groupby(cells.missing, itemgetter(0))]
    columns = [d for d, _ in missing], [optimizers for _, optimizers in missing]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done, rows in enumerate(pool.map(_cells, *columns), start=1):
            cells.extend(rows)
            print(f"{done}/{len(missing)} {rows[0]['discriminator']}", flush=True)
        for rows in pool.map(_rows_of_optimizer, [name for (name,) in parity.missing]):
            parity.extend(rows)
    failures = [row for row in cells.rows if wrong(row)] + [r for r in parity.rows if inexact(r)]
    for row in failures:
        print(row)
    print(f"{len(cells.rows)} cells, {len(parity.rows)} optimizers, {len(failures)} wrong")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
