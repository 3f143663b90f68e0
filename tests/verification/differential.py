"""The library at two revisions: every outcome of the correctness matrix, compared bit for bit.

    python -m tests.verification.differential 169e8af                    the whole matrix
    python -m tests.verification.differential 169e8af --share 0.1        every tenth discriminator
    python -m tests.verification.differential 169e8af --modes compiled   a covering subset, compiled

A revision is unpacked beside the checkout, and both play the games of the tests as they stand now.
An outcome is f_K, its gradient in the fakes, what `unroll()` returns, the state of the random
generator, and what was warned of; or the type of a refusal and the arguments that it names. It runs
after every slice of a redesign: what differs by more than `--tolerance` is printed and counted. Of
optimizers that a revision does not know, no outcome is compared.

`compiled` traces and differentiates graphs as a compilation does, then runs them as they are
("aot_eager"): every optimizer and every discriminator once.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchopt.pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
TOGETHER = 6  # discriminators a process, which takes seconds to start
MODES: dict[str, dict[str, bool]] = {
    "plain": {},
    "checkpoint": {"checkpoint": True},
    "stop_gradient": {"stop_gradient": True},
    "average": {"average": True},
}
Outcome = dict[str, Any]


def lend_names() -> None:
    """Lend an old revision the names that today's tests import; nothing that is compared has them.

    Its own refusal of an optimizer is what tells that it does not know it.
    """
    import unroll

    for name in ("register_rule", "ClipGradNorm", "ClipGradValue"):
        vars(unroll).setdefault(name, lambda *_: None)
    if find_spec("unroll._optimizers") is None:
        rules = ModuleType("unroll._optimizers.group_rules")
        package = ModuleType("unroll._optimizers")
        vars(package)["group_rules"] = rules
        sys.modules |= {module.__name__: module for module in (package, rules)}


def outcome(optimizer_name: str, discriminator_name: str, options: Mapping[str, Any]) -> Outcome:
    """Return what the library that is imported makes of a game, tensors and words."""
    from tests import matrix
    from tests.architectures import ARCHITECTURES
    from tests.settings import randn
    from tests.zoo_refused import Refusal
    from unroll import UnrolledGeneratorLoss

    animal: Any = matrix.DISCRIMINATORS[discriminator_name]
    torch.manual_seed(matrix.SEED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            d = animal.make()
            optimizer, objective = matrix.COLUMNS[optimizer_name](d), animal.objective
            samples = 2 if discriminator_name in ARCHITECTURES else matrix.SAMPLES
            if isinstance(optimizer, torch.optim.Optimizer) and optimizer.defaults.get("maximize"):
                objective = matrix.Maximised(objective)
            draws = [randn(samples, *animal.shape) for _ in range(6)]
            with sdpa_kernel(SDPBackend.MATH):
                pairs = [(animal.feed(a), animal.feed(b + 0.5)) for a, b in zip(*[iter(draws)] * 2)]  # noqa: B905
                refused = isinstance(animal, Refusal)
                state = {} if refused else matrix.warmed(d, optimizer, pairs[1:], objective)
            loss = UnrolledGeneratorLoss(d, optimizer, objective, unroll_steps=matrix.K, **options)
            fake, real = draws[0].requires_grad_(), pairs[0][1]
            found: Outcome = {}
            for call in ("first", "second"):  # the second meets what the first has found out
                torch.manual_seed(matrix.SEED)
                value = loss(animal.feed(fake), real, **state)
                (gradient,) = torch.autograd.grad(value, fake)
                found |= {f"{call} f_K": value, f"{call} gradient": gradient}
            torch.manual_seed(matrix.SEED)
            ahead = loss.unroll(animal.feed(fake), real, **state)
            found |= {f"parameter {name}": p for name, p in ahead.parameters.items()}
            found |= {f"buffer {name}": b for name, b in ahead.buffers.items()}
            found |= {f"state {i}": s for i, s in enumerate(tree_leaves(ahead.optimizer_state))}
            found |= {"losses": ahead.losses, "random state": torch.get_rng_state()}
            found |= {f"own {name}": value for name, value in d.state_dict().items()}
        except Exception as error:
            found = {"refusal": f"{type(error).__name__}: {str(error).partition(':')[0]}"}
            found["words"] = str(error)
    known = {str(w.message).partition(":")[0] for w in caught if "Unroll" not in str(w.message)}
    found["warnings"] = sorted(known)
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def _cells(discriminator: str, modes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the optimizers and modes that a discriminator meets."""
    from tests import matrix
    from tests.architectures import ARCHITECTURES

    few = discriminator in ARCHITECTURES
    for optimizer in matrix.FEW if few else matrix.COLUMNS:
        yield from ((optimizer, mode) for mode in modes if mode != "compiled")
    if "compiled" in modes:
        names, optimizers = list(matrix.DISCRIMINATORS), list(matrix.COLUMNS)
        own = [o for d, o in zip(names, cycle(optimizers), strict=False) if d == discriminator]
        yield from ((optimizer, "compiled") for optimizer in own)


def work(discriminators: Sequence[str], modes: Sequence[str], package: Path, path: Path) -> None:
    """Write the outcomes of some discriminators under one revision to a file."""
    import unroll

    if Path(unroll.__file__).parents[1] != package:
        raise RuntimeError(f"{package}: the worker imported {unroll.__file__}")
    torch.set_num_threads(1)
    found: dict[tuple[str, str, str], Outcome] = {}
    for d in discriminators:
        for optimizer, mode in _cells(d, modes):
            if mode == "compiled":
                _trace_only()
                found[d, optimizer, mode] = outcome(optimizer, d, {"compile": True})
                torch._dynamo.reset()
            else:
                found[d, optimizer, mode] = outcome(optimizer, d, MODES[mode])
    torch.save(found, path)


def _trace_only() -> None:
    """Let no code be generated, wherever a revision keeps its backend."""
    from torch._dynamo import lookup_backend

    for name, module in list(sys.modules.items()):
        if name.startswith("unroll.") and hasattr(module, "inductor"):
            vars(module)["inductor"] = lookup_backend("aot_eager")
        if name.startswith("unroll.") and hasattr(module, "generated"):
            vars(module)["generated"] = lambda graph, _, **__: lambda inputs: graph(*inputs)


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same at both revisions."""

    cell: tuple[str, ...]
    what: str
    size: str  # relative error, or both values

    def __str__(self) -> str:
        """Return it in a line."""
        return f"{' | '.join(self.cell)}: {self.what}: {self.size}"


def differences(cell: tuple[str, ...], old: Outcome, new: Outcome) -> Iterator[Difference]:
    """Yield what differs between two outcomes, down to the last bit."""
    for what in sorted(old.keys() | new.keys(), key=str):
        a, b = old.get(what), new.get(what)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
            if not torch.equal(a.nan_to_num(), b.nan_to_num()):
                error = (a.double() - b.double()).norm() / a.double().norm()
                yield Difference(cell, what, f"{error:.1e}")
        elif type(a) is not type(b) or isinstance(a, Tensor) or a != b:
            yield Difference(cell, what, f"{a!r:.150} -> {b!r:.150}")


def unpacked(revision: str, folder: Path) -> Path:
    """Return a folder that holds the package of a revision."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "unroll"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def both(
    discriminators: Sequence[str], modes: Sequence[str], packages: Sequence[Path]
) -> list[Difference]:
    """Return the differences of some discriminators, each revision in a process of its own."""
    outcomes = []
    for package in packages:
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            subprocess.run(
                [
                    *(sys.executable, "-m", __spec__.name, str(package)),
                    *("--worker", file.name, *discriminators, "--modes", *modes),
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [package, ROOT]))},
                cwd=package,  # comes before PYTHONPATH
                check=True,
            )
            outcomes.append(torch.load(file.name, weights_only=False))
    old, new = outcomes
    return [
        difference
        for cell in old
        if "refusal" in new[cell] or not old[cell].get("words", "").startswith("optimizer: ")
        for difference in differences(cell, old[cell], new[cell])
    ]


def main() -> None:
    """Compare the checkout with the revision."""
    lend_names()
    from tests import matrix

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="what the checkout is compared with")
    parser.add_argument("--modes", nargs="+", choices=[*MODES, "compiled"], default=list(MODES))
    parser.add_argument("--only", default="", help="part of a discriminator's name")
    parser.add_argument("--share", type=float, default=1.0, help="of the discriminators")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative; default: no bit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: one a core")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        path, *names = options.worker
        work(names, options.modes, Path(options.revision), Path(path))
        return

    names = [name for name in matrix.DISCRIMINATORS if options.only in name]
    names = names[:: round(1 / options.share)]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        packages = unpacked(options.revision, Path(temporary)), ROOT
        some = [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)]
        compare = partial(both, modes=options.modes, packages=packages)
        found: list[Difference] = []
        for done, rows in zip(some, pool.map(compare, some)):  # noqa: B905
            print(", ".join(done), flush=True)
            for row in rows:
                print(f"  {row}", flush=True)
            found += rows

    def small(size: str) -> bool:
        return "->" not in size and float(size) <= options.tolerance

    large = [row for row in found if not small(row.size)]
    cells = sum(len(list(_cells(name, options.modes))) for name in names)
    print(f"{cells} cells, {len(found)} differences, {len(large)} beyond {options.tolerance:g}")
    for what, count in Counter(row.what for row in large).most_common():
        print(f"  {count} x {what}")
    sys.exit(bool(large))


if __name__ == "__main__":
    main()
