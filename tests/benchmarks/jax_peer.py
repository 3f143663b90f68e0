"""JAX and optax, which live in an environment of their own, as one more peer."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from tests.benchmarks.networks import BETAS, EPS, EPS_ROOT, LR, STEPS, Game

WORKER = Path(__file__).with_name("jax_worker.py")


def environment(folder: Path) -> Path:
    """Return the Python of an environment with JAX, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder} for JAX", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import jax, optax"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "jax", "optax"], check=True)
    return python


class Worker:
    """A process that takes generator steps at our word, and tells how long it worked."""

    def __init__(self, python: Path, game: Game, k: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        setting = {
            "generator": game.networks.generator,
            "discriminator": game.networks.discriminator,
            "unroll_steps": k,
            "lr": LR,
            "betas": BETAS,
            "eps": EPS,
            "eps_root": EPS_ROOT,
            "steps": STEPS,
        }
        (folder / "setting.json").write_text(json.dumps(setting))
        groups: dict[str, Sequence[Tensor]] = {
            "g": list(game.generator.parameters()),
            "d": list(game.discriminator.parameters()),
            "mu": game.moments[0],
            "nu": game.moments[1],
            "z": [game.z],
            "real": [game.real],
        }
        arrays = {
            f"{name} {i}": t.detach().numpy()
            for name, group in groups.items()
            for i, t in enumerate(group)
        }
        np.savez(folder / "arrays.npz", allow_pickle=False, **arrays)
        self._process = subprocess.Popen(
            [python, WORKER, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "errors").open("w"),
            text=True,
        )
        self.seconds = 0.0  # that it has worked; the clock of its Timer
        self.peak_kib = 0
        self.found: dict[str, Any] = self._answer()  # versions, its fastest form, its first call

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"JAX: {(Path(self._folder.name) / 'errors').read_text()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self, order: str = "step") -> None:
        """Take a step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.seconds += float(answer["seconds"])
        self.peak_kib = int(answer["peak_kib"])

    def gradient(self) -> tuple[Tensor, ...]:
        """Take a step and return the gradient."""
        self.step("gradient")
        with np.load(Path(self._folder.name) / "gradient.npz") as file:
            return tuple(torch.from_numpy(file[f"arr_{i}"]) for i in range(len(file.files)))

    def clock(self) -> float:
        """Return the seconds that it has worked."""
        return self.seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()
