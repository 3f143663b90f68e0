"""Whether the library has become slower or larger: paired rounds against another revision.

    python -m tests.verification.speed 169e8af                   four networks, K = 10, two modes
    python -m tests.verification.speed 169e8af --networks paper --rounds 30

Each revision works in a process of its own and takes its generator steps in turn; the order within
a round alternates. Printed are the mean ratio of times with its 95 % interval (Student's, over the
logarithms of the rounds' ratios) and the ratio of peak resident memory. Nothing else should run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from tests.verification.differential import ROOT, unpacked

MODES = {"plain": {}, "checkpoint": {"checkpoint": True}, "compile": {"compile": True}}


def work(network: str, k: int, mode: str, threads: int) -> None:
    """Take as many steps as every line of the input says, and tell how long they took."""
    from tests.benchmarks.cell import kib
    from tests.benchmarks.networks import NETWORKS, game
    from tests.benchmarks.peers import unrolled

    torch.set_num_threads(threads)
    step = unrolled(game(NETWORKS[network]), k, **MODES[mode])
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        seconds = time.perf_counter() - start
        peak = kib("/proc/self/status", "VmHWM")
        print(json.dumps({"seconds": seconds, "peak_kib": peak}), flush=True)


class Worker:
    """A revision at work."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def steps(self, count: int) -> dict[str, float]:
        """Take steps, and return their seconds and the peak of memory so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        answer: dict[str, float] = json.loads(self.process.stdout.readline())
        return answer


@contextmanager
def worker(package: Path, network: str, k: int, mode: str, threads: int) -> Iterator[Worker]:
    """Start a revision, and end it."""
    arguments = ["--worker", network, str(k), mode, "--threads", str(threads)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.verification.speed", "-", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [package, ROOT]))},
        cwd=package,  # comes before PYTHONPATH
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Worker(process)
        assert process.stdin is not None
        process.stdin.close()


def compare(
    packages: dict[str, Path], network: str, k: int, mode: str, rounds: int, threads: int
) -> str:
    """Return a line: how the checkout compares with the revision."""
    with ExitStack() as stack:
        old, new = (
            stack.enter_context(worker(package, network, k, mode, threads))
            for package in packages.values()
        )
        for each in (old, new):
            each.steps(2)  # the search of the first call, and what is compiled
        count = max(1, round(0.5 / old.steps(1)["seconds"]))
        ratios, peaks = [], {}
        for number in range(rounds):
            found = {}
            for each in (old, new) if number % 2 else (new, old):
                found[each] = each.steps(count)
            ratios.append(found[new]["seconds"] / found[old]["seconds"])
            peaks = {each: answer["peak_kib"] for each, answer in found.items()}
    logs = np.log(ratios)
    low, high = stats.t.interval(0.95, rounds - 1, logs.mean(), stats.sem(logs))
    time_ratio = f"{np.exp(logs.mean()):.3f} [{np.exp(low):.3f}, {np.exp(high):.3f}]"
    return f"{network} | {k} | {mode} | {time_ratio} | {peaks[new] / peaks[old]:.3f}"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="what the checkout is compared with")
    networks = ["paper", "wide", "conv", "dcgan32"]
    parser.add_argument("--networks", nargs="+", default=networks)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["plain", "checkpoint"])
    parser.add_argument("--unroll-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        network, k, mode = options.worker
        work(network, int(k), mode, options.threads)
        return

    with tempfile.TemporaryDirectory() as folder:
        packages = {"old": unpacked(options.revision, Path(folder)), "new": ROOT}
        print("network | K | mode | time, new / old [95 %] | peak memory, new / old")
        for network in options.networks:
            for mode in options.modes:
                settings = (network, options.unroll_steps, mode, options.rounds, options.threads)
                print(compare(packages, *settings), flush=True)


if __name__ == "__main__":
    main()
