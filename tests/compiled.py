"""Compiled steps on record: which discriminators and optimizers they serve, and how exactly.

python -m tests.compiled                  compare compiled and uncompiled losses; fail if one is off
python -m tests.compiled --record         write docs/results/compiled.csv, or go on
python -m tests.compiled --only dropout   only discriminators with that in their name, again

Every discriminator of the zoo with Adam, and one of them with every optimizer: f_K and its gradient
in the fakes and in the data, two calls, float64, K = 3, after a real step. Graphs are traced and
differentiated as in a compilation, and then run as they are: what code generators add is in
tests/test_compile.py and in the benchmarks, which compare gradients too.
"""

import argparse
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.matrix import COLUMNS, RESULTS, SEED, K, Record, Row, warmed
from tests.settings import randn
from tests.zoo import ZOO
from unroll import UnrolledGeneratorLoss
from unroll._modes import backend

ADAM, TANH, BOUND = "torch Adam", "tanh", 1e-10


def row(discriminator: str, optimizer_name: str) -> Row:
    """Return a row of the record."""
    compilations = []

    def as_it_is(graph: Any, _: Any, *, is_backward: bool) -> Any:
        if not is_backward:
            compilations.append(graph)
        return lambda inputs: graph(*inputs)

    vars(backend)["generated"] = as_it_is
    animal = ZOO[discriminator]
    torch.manual_seed(SEED)
    d = animal.make()
    optimizer = COLUMNS[optimizer_name](d)
    draws = randn(4, 5, *animal.shape)
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # a real step of R1 needs it
        warnings.simplefilter("ignore")
        pair = (animal.feed(draws[0]), animal.feed(draws[1]))
        state = warmed(d, optimizer, [pair], animal.objective)
    found: list[list[Tensor]] = []
    start = time.perf_counter()
    for compile in (False, True):
        torch.manual_seed(SEED)
        loss = UnrolledGeneratorLoss(
            d, optimizer, animal.objective, unroll_steps=K, compile=compile
        )
        results: list[Tensor] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                ends = [draw.clone().requires_grad_() for draw in draws[2:]]
                value = loss(*map(animal.feed, ends), **state)
                gradients = torch.autograd.grad(value, ends, materialize_grads=True)
                results += [value.detach(), *gradients]
        found.append(results)
    seconds = time.perf_counter() - start
    errors = [
        float((b - a).norm() / a.norm()) if a.norm() else float(b.norm())
        for a, b in zip(*found, strict=True)
    ]
    torch._dynamo.reset()
    reasons = [str(w.message) for w in caught if "runs uncompiled" in str(w.message)]
    return {
        "discriminator": discriminator,
        "optimizer": optimizer_name,
        "compiled": str(not reasons),
        "reason": reasons[0].partition("same result: ")[2][:120] if reasons else "",
        "compilations": str(len(compilations)),
        "relative_error": f"{max(errors):.2g}",
        "seconds": f"{seconds:.1f}",
    }


def wrong(row: Row) -> bool:
    """Return whether the two losses differ."""
    return not float(row["relative_error"]) <= BOUND


def _started() -> None:
    torch.set_num_threads(1)


def main() -> None:
    """Compare what is missing, and judge everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write to docs/results/")
    parser.add_argument("--only", default="", help="part of a discriminator's name")
    parser.add_argument("--jobs", type=int, default=1, help="processes; at most one a core")
    options = parser.parse_args()
    pairs = [(name, ADAM) for name in ZOO]
    pairs += [(TANH, optimizer) for optimizer in COLUMNS if optimizer != ADAM]
    path = RESULTS / "compiled.csv" if options.record else None
    record = Record(path, ("discriminator", "optimizer"), pairs, wrong, options.only)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn, initializer=_started) as pool:
        for done in pool.map(row, *zip(*record.missing, strict=True)) if record.missing else ():
            record.extend([done])
            print(*done.values(), sep=" | ", flush=True)
    off = [r for r in record.rows if wrong(r)]
    served = sum(r["compiled"] == "True" for r in record.rows)
    print(f"{len(record.rows)} pairs, {served} compiled, {len(off)} wrong")
    sys.exit(bool(off))


if __name__ == "__main__":
    main()
