"""One measurement in a process of its own: a peer's first step, or all peers in turns.

What it found is the last line that it prints, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Measurement, Timer

from tests.benchmarks.jax_peer import Worker
from tests.benchmarks.networks import NETWORKS, game
from tests.benchmarks.peers import JAX, PLAIN, RIVALS, build

Times = dict[str, list[list[float]]]  # of each peer, round by round
ROUNDS = (3, 15)  # at least and at most


def kib(path: str, name: str) -> int:
    """Return an entry of one of the kernel's tables."""
    (line,) = (line for line in Path(path).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def first_step(
    peer: str, network: str, k: int, jax: Path | None, device: str = "cpu"
) -> tuple[Any, tuple[Tensor, ...]]:
    """Return what a first step costs, and the gradient."""
    played = game(NETWORKS[network], device)
    on_gpu = torch.device(device).type == "cuda"
    if peer == JAX:
        assert jax is not None
        with Worker(jax, played, k) as worker:
            gradient = worker.gradient()
            found = {"second": worker.seconds, "peak_kib": worker.peak_kib}
            return found | worker.found, gradient
    step = build(peer, played, k)
    times = [time.perf_counter()]
    for _ in range(3):
        gradient = step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    peak = kib("/proc/self/status", "VmHWM")  # getrusage's would be the parent's, if larger
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() // 1024
    # A compiled step is compiled at its second use, which is in the second call where K = 1.
    steady = times[3] - times[2]
    found = {"first": times[2] - times[0] - steady, "second": steady, "peak_kib": peak}
    return found, gradient


def in_turns(timers: Mapping[str, Timer], seconds: Mapping[str, float], budget: float) -> Times:
    """Time the peers one after the other, round after round.

    Args:
        timers: Of one step of each peer.
        seconds: What a step of each costs, about.
        budget: Seconds for all of it; at least three rounds are made.
    """
    rounds = int(budget / 2 / sum(seconds.values()))  # a Timer warms up by a step
    rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
    share = budget / 2 / rounds / len(timers)
    found: Times = {peer: [] for peer in timers}
    for _ in range(rounds):
        for peer, timer in timers.items():
            measured: Measurement = timer.blocked_autorange(min_run_time=share)
            found[peer].append(measured.times)
    return found


def ratio(times: Times, peer: str, other: str | None) -> float | None:
    """Return the median over rounds of one peer's time over another's."""
    if other is None or other not in times:
        return None
    pairs = zip(times[peer], times[other], strict=True)
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def summary(times: Times) -> dict[str, dict[str, float | str | None]]:
    """Return the statistics of each peer."""
    flat = {peer: [t for part in parts for t in part] for peer, parts in times.items()}
    medians = {peer: statistics.median(values) for peer, values in flat.items()}
    found: dict[str, dict[str, float | str | None]] = {}
    for peer, values in flat.items():
        low, _, high = statistics.quantiles(values, n=4)
        others = [rival for rival in RIVALS if rival in times and rival != peer]
        best = min(others, key=medians.__getitem__, default=None)
        found[peer] = {
            "median_ms": 1e3 * medians[peer],
            "low_ms": 1e3 * low,
            "high_ms": 1e3 * high,
            "rounds": len(times[peer]),
            "vs_plain": ratio(times, peer, PLAIN),
            "best_torch_peer": best,
            "vs_best_torch_peer": ratio(times, peer, best),
            "vs_jax": ratio(times, peer, JAX),
        }
    return found


def timed(
    seconds: Mapping[str, float], network: str, k: int, budget: float, jax: Path | None, device: str
) -> Times:
    """Time the peers that ``seconds`` names."""
    played = game(NETWORKS[network], device)
    with ExitStack() as stack:
        timers = {}
        for peer in seconds:
            settings: dict[str, Any] = {"description": peer, "num_threads": torch.get_num_threads()}
            if peer == JAX:
                assert jax is not None
                worker = stack.enter_context(Worker(jax, played, k))
                settings["timer"] = worker.clock
                step: Callable[[], object] = worker.step
            else:
                step = build(peer, played, k)
            step()
            timers[peer] = Timer("step()", globals={"step": step}, **settings)
        return in_turns(timers, seconds, budget)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("unroll_steps", type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--jax", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--first", metavar="PEER")
    parser.add_argument("--gradient", type=Path, help="where --first leaves its gradient")
    parser.add_argument("--timed", type=json.loads, metavar="JSON", help="peers and their seconds")
    parser.add_argument("--budget", type=float, default=0.0)
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # JAX's threads too
    torch.set_num_threads(options.threads)
    most = (
        kib("/proc/meminfo", "MemAvailable") * 1024 * 9 // 10
    )  # beyond it, an error in place of the kernel's choice
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    network, k, jax = options.network, options.unroll_steps, options.jax
    if options.first:
        found, gradient = first_step(options.first, network, k, jax, options.device)
        torch.save([t.detach().cpu() for t in gradient], options.gradient)
    else:
        found = summary(timed(options.timed, network, k, options.budget, jax, options.device))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
