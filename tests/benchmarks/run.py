"""The cells of the benchmark, each in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.networks import NETWORKS
from tests.benchmarks.peers import CHECKPOINT, COMPILE, JAX, PLAIN, UNROLL, installed
from tests.benchmarks.record import COLUMNS, ROOT, Cell, Row, revision

# What glibc maps anew for a tensor, the kernel zeroes page by page; it accepts 32 MiB at most.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "thresholds": {
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    },
    "mapped": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
}
TOLERANCE = 1e-4
# Compilers round otherwise, and a LeakyReLU at its kink then takes the other slope: 2e-4 of the
# gradient already at K = 0 (JAX). The least second term of these networks is 9e-2.
COMPILED = (JAX, COMPILE)
TOLERANCE_OF_COMPILERS_ON_IMAGES = 1e-3
MEMORY_ERRORS = ("can't allocate memory", "RESOURCE_EXHAUSTED", "bad_alloc", "MemoryError")


@dataclass
class Bench:
    """Measures cells."""

    peers: Sequence[str]
    threads: int
    budget: float  # seconds of timing a cell
    limit: float  # seconds that three steps of a peer may take
    jax: Path | None
    device: str = "cpu"
    in_turns: bool = True  # else a time is that of one step, of the peer on its own
    failed: dict[tuple[str, str, str], tuple[int, str]] = field(default_factory=dict)

    def measure(self, cell: Cell) -> list[Row]:
        """Return a row for every peer, or stop at a wrong gradient."""
        with tempfile.TemporaryDirectory() as folder:
            return self._measure(cell, Path(folder))

    def _measure(self, cell: Cell, folder: Path) -> list[Row]:
        first, gradients, status = self._first_steps(cell, folder)
        errors = disagreements(cell.network, gradients)
        load = os.getloadavg()[0]
        seconds = {peer: found["second"] for peer, found in first.items()}
        results: dict[str, Any] = {}
        if not self.in_turns:
            results = {p: {"median_ms": 1e3 * s, "rounds": 1} for p, s in seconds.items()}
        elif seconds:
            arguments = ["--timed", json.dumps(seconds), "--budget", str(self.budget)]
            try:
                results = self._child(cell, folder, arguments, limit=None)
            except OverBudget as over:
                status |= dict.fromkeys(seconds, f"{over}, in turns")
        jax = first.get(JAX, {})
        settings = {
            "network": cell.network,
            "unroll_steps": cell.unroll_steps,
            "batch_size": NETWORKS[cell.network].batch_size,
            "allocator": cell.allocator,
            "device": self.device,
            "threads": self.threads,
            "load_average": load,
            "torch": torch.__version__,
            "torchopt": installed("torchopt"),
            "higher": installed("higher"),
            "jax": jax.get("jax", ""),
            "optax": jax.get("optax", ""),
            "jax_form": jax.get("form", ""),
            "revision": revision(),
        }
        rows = []
        for peer in self.peers:
            measured = settings | results.get(peer, {}) | {"peer": peer, "status": status[peer]}
            measured["gradient_error"] = errors.get(peer)
            if peer in first:
                measured["first_ms"] = 1e3 * first[peer]["first"]
                measured["peak_mib"] = first[peer]["peak_kib"] / 1024
            rows.append({column: _written(measured.get(column)) for column in COLUMNS})
        return rows

    def _first_steps(
        self, cell: Cell, folder: Path
    ) -> tuple[dict[str, Any], dict[str, list[Tensor]], dict[str, str]]:
        first, gradients, status = dict[str, Any](), dict[str, list[Tensor]](), dict[str, str]()
        path = folder / "gradient.pt"
        for peer in self.peers:
            key = (peer, cell.network, cell.allocator)
            least, reason = self.failed.get(key, (sys.maxsize, ""))
            if cell.unroll_steps >= least:
                status[peer] = reason
                continue
            try:
                arguments = ["--first", peer, "--gradient", str(path)]
                first[peer] = self._child(cell, folder, arguments, limit=self.limit)
                gradients[peer], status[peer] = torch.load(path), "ok"
            except OverBudget as over:
                status[peer] = str(over)
                self.failed[key] = cell.unroll_steps, str(over)
        return first, gradients, status

    def _child(
        self, cell: Cell, folder: Path, arguments: Sequence[str], *, limit: float | None
    ) -> Any:
        command = [sys.executable, "-m", "tests.benchmarks.cell", cell.network]
        command += [str(cell.unroll_steps), "--threads", str(self.threads), *arguments]
        command += ["--device", self.device]
        command += ["--jax", str(self.jax)] if self.jax else []
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
        }
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # without code from earlier
        return last_line(command, environment | threads | ALLOCATORS[cell.allocator], limit)


class OverBudget(Exception):
    """A peer takes more time or memory than there is."""


def last_line(command: Sequence[str], environment: Mapping[str, str], limit: float | None) -> Any:
    """Run a command, and read the last line that it prints."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its JAX worker ends with it
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise OverBudget(f"over {limit:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == -signal.SIGKILL or any(e in errors for e in MEMORY_ERRORS):
        raise OverBudget("out of memory")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors}")
    return json.loads(output.splitlines()[-1])


def disagreements(network: str, gradients: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Return how far each gradient is from that of `unroll`, or raise.

    The plain steps of D have none, except the generator's own at K = 0.
    """
    flat = {p: torch.cat([t.flatten() for t in g]).double() for p, g in gradients.items() if g}
    reference = next((flat[own] for own in (UNROLL, CHECKPOINT, PLAIN) if own in flat), None)
    if reference is None:
        return {}
    images = len(NETWORKS[network].sample) > 1
    errors = {p: float((g - reference).norm() / reference.norm()) for p, g in flat.items()}
    for peer, error in errors.items():
        bound = TOLERANCE_OF_COMPILERS_ON_IMAGES if peer in COMPILED and images else TOLERANCE
        if not error <= bound:
            raise AssertionError(
                f"{peer} on {network}: its gradient is {error:.1e} of its norm off that of unroll, "
                f"more than {bound:.0e}. Nobody is timed for a wrong answer."
            )
    return errors


def _written(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
