"""One generator step (f_K and its gradient in theta_G): time and memory, next to the peers.

python -m tests.benchmarks                 print the table
python -m tests.benchmarks --quick         two networks, two K: in under five minutes
python -m tests.benchmarks --record        write docs/results/benchmarks.csv and the figures
python -m tests.benchmarks --record --resume    go on
python -m tests.benchmarks --only 'paper K=(1|10) default'
python -m tests.benchmarks --memory --only 'conv K=100'     memory, and times of one step

A cell is a network, a K and an allocator. Every peer first takes three steps in a process of its
own, for the time of the first, the peak of its memory and its gradient; a peer whose gradient is
not that of `unroll` ends the command. Then all take turns in one process, round after round.
"""

import argparse
import os
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tests.benchmarks.figures import draw
from tests.benchmarks.jax_peer import environment
from tests.benchmarks.networks import NETWORKS
from tests.benchmarks.peers import JAX, PEERS, absent
from tests.benchmarks.record import RECORD, Cell, Record, revision, table
from tests.benchmarks.run import ALLOCATORS, Bench

STEPS = (0, 1, 5, 10, 20, 50, 100)


def cells(*, quick: bool, only: str) -> Iterator[Cell]:
    """Return what to measure."""
    networks = [name for name in NETWORKS if name != "tiny"][: 2 if quick else None]
    steps, allocators = ((0, 10), ["default"]) if quick else (STEPS, [*ALLOCATORS])
    for allocator, network, k in product(allocators, networks, steps):
        cell = Cell(network, k, allocator)
        if re.search(only, str(cell)):
            yield cell


def main() -> None:
    """Measure what is missing, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path.home() / ".cache" / "unroll-benchmarks" / "jax"
    parser.add_argument("--quick", action="store_true", help="a small table")
    parser.add_argument("--only", default="", help="pattern in a cell's name, as printed")
    parser.add_argument("--without", action="append", default=[], choices=PEERS, metavar="PEER")
    parser.add_argument("--budget", type=float, help="seconds of timing a cell (60; --quick: 5)")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="no turns: memory, and the time of each peer's third step",
    )
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds for three steps of a peer on their own"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1; not JAX's")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--jax", type=Path, default=cache, help="JAX's environment; made if absent")
    parser.add_argument("--record", action="store_true", help="write docs/results/benchmarks.csv")
    parser.add_argument("--resume", action="store_true", help="keep this revision's cells of it")
    options = parser.parse_args()

    missing = absent()
    for peer, reason in missing.items():
        print(f"absent: {peer} ({reason})")
    peers = [peer for peer in PEERS if peer not in missing and peer not in options.without]
    bench = Bench(
        peers=peers,
        threads=options.threads,
        budget=options.budget or (5.0 if options.quick else 60.0),
        limit=options.limit,
        jax=environment(options.jax) if JAX in peers else None,
        device=options.device,
        in_turns=not options.memory,
    )
    record = Record(RECORD if options.record else None)
    wanted = list(cells(quick=options.quick, only=options.only))
    if not wanted:
        parser.error(f"--only {options.only!r}: names no cell")
    for cell in wanted:
        if options.resume and record.holds(cell, revision(), options.threads):
            continue
        rows = bench.measure(cell)
        record.replace(cell, rows)
        print(f"\n{cell}\n{table(rows)}", flush=True)
    if options.record:
        draw(record.rows)


if __name__ == "__main__":
    main()
