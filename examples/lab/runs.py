"""Runs that survive an interruption: atomic files, checkpoints, several processes."""

import hashlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.nn.utils import get_total_norm
from tqdm import tqdm

SECONDS_BETWEEN_CHECKPOINTS = 10
SECONDS_AT_RISK = 45  # where evaluations are further apart than that
Parts = Mapping[str, Any]  # with `state_dict` and `load_state_dict`: networks, optimizers


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a draft beside `path` and put it in place when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def refuse(error: Exception) -> NoReturn:
    """Stop before any work, and say why."""
    tqdm.write(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def check_writable(flag: str, folder: Path) -> None:
    """Refuse a folder in which no file can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} must be in a folder that can be written to, {folder} cannot ({error}): give "
            "another one"
        ) from error


def provenance() -> dict[str, str]:
    """Return the versions that a number depends on; a revision with changed sources ends in "+"."""

    def git(*command: str) -> str:
        whole = ["git", "-C", str(Path(__file__).resolve().parents[2]), *command]
        return subprocess.run(whole, capture_output=True, text=True, check=True).stdout.strip()

    try:
        revision = git("rev-parse", "--short=10", "HEAD")
        revision += "+" * bool(git("status", "--porcelain", "--", "unroll", "examples"))
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {"torch": str(torch.__version__), "revision": revision}


def digest(states: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of tensors and their names, whatever file they are in."""
    whole = hashlib.sha256()
    for name, value in states.items():
        whole.update(name.encode())
        whole.update(value.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:12]


def save(
    path: Path, settings: Mapping[str, Any], parts: Parts, rng: Any, log: Mapping[str, Any]
) -> None:
    """Write a checkpoint from which a run continues to bit-identical numbers."""
    states = {name: part.state_dict() for name, part in parts.items()}
    content = {"settings": settings, "parts": states, "rng": rng.get_state(), "log": log}
    whole = io.BytesIO()  # torch's own writer does not say that a disk is full
    torch.save(content, whole)
    write_atomically(path, lambda draft: draft.write_bytes(whole.getbuffer()))


def load(path: Path, parts: Parts, rng: Any) -> dict[str, Any]:
    """Restore every part and the generator from a checkpoint, and return its log."""
    content = torch.load(path, map_location=rng.device, weights_only=True)
    rng.set_state(content["rng"].cpu())
    for name, part in parts.items():
        part.load_state_dict(content["parts"][name])
    log: dict[str, Any] = content["log"]
    return log


def read_log(path: Path) -> dict[str, Any]:
    log: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)["log"]
    return log


def update(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, who: str, checkpoint: Path
) -> None:
    """Take a step of finite numbers, or stop before it reaches a checkpoint."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(loss + norm):
        found = f"the loss and its gradient must be finite, they are {loss.item():g} and {norm:g}"
        raise FloatingPointError(_stopped(f"{who}: {found}", checkpoint))
    optimizer.step()
    if not torch.isfinite(length := get_total_norm(parameters)):
        found = f"the step must leave the parameters finite, their norm is {length:g}"
        raise FloatingPointError(_stopped(f"{who}: {found}", checkpoint))


def _stopped(what: str, checkpoint: Path) -> str:
    kept = "none yet"
    if checkpoint.exists():
        log = read_log(checkpoint)
        pair = log["since"][0] if "since" in log else log["history"][-1]["pairs"]
        kept = f"{checkpoint} is of pair {pair}"
    return (
        f"{what} (the last checkpoint: {kept}): lower the learning rates, or leave --amp, in "
        "another folder"
    )


def check(path: Path, settings: Mapping[str, Any], *, length: str) -> None:
    """Refuse the checkpoint of a run with other settings; the one named `length` may have grown."""
    try:
        then = torch.load(path, map_location="cpu", weights_only=True)["settings"]
    except Exception as error:  # pickle, zip and torch have one each
        message = f"{path} cannot be read ({error}): delete it, or use another folder"
        raise ValueError(message) from error
    odd = {name for name in settings.keys() | then.keys() if settings.get(name) != then.get(name)}
    if odd == {length} and settings[length] > then[length]:
        return
    if odd:
        was = ", ".join(f"{n} {then.get(n)}, not {settings.get(n)}" for n in sorted(odd))
        raise ValueError(f"{path} cannot be resumed, it has {was}: use another folder")


def bar(config: Any, line: int = 0, **how: Any) -> "tqdm[int]":
    """Return the progress bar of a run, drawn."""
    counts = "epochs" if hasattr(config, "epochs") else "pairs"
    return tqdm(
        desc=f"{config.label}, {config.models}",
        total=getattr(config, counts),
        mininterval=0.5 if sys.stderr.isatty() else 30,
        position=line,
        unit=counts[:-1],
        **how,
    )


def iterate(
    config: Any,
    options: Any,
    line: int,
    parts: Parts,
    rng: Any,
    evaluate: Callable[[int, Sequence[Mapping[str, Any]]], tuple[dict[str, Any], Any]],
    *,
    writes: bool = True,
) -> Iterator[int]:
    """Count the pairs (or epochs) of a training loop; evaluate and save between them.

    On a CPU the `seconds` of a row are CPU time of the process, which other work on the machine
    hardly changes. On other devices they are wall-clock time.

    Args:
        config: The settings of the run: its length, and when to evaluate.
        options: Where the checkpoint is, and whether to start from it if it exists.
        line: That of the progress bar.
        parts: Everything that training changes.
        rng: The generator that every random number of the training comes from.
        evaluate: Given the pairs done and the earlier rows, returns a row of metrics and a
            snapshot for the figures. It must not draw from `rng`.
        writes: Whether this process saves; of several ranks that train alike, one does.
    """
    path, settings = config.checkpoint(options.out), asdict(config)
    counts = "epochs" if hasattr(config, "epochs") else "pairs"
    length, every = getattr(config, counts), config.evaluate_every
    log: dict[str, Any] = {"history": [], "snapshots": []}
    if options.resume and path.exists():
        log = load(path, parts, rng)
    history, snapshots = log["history"], log["snapshots"]
    last = history[-1] if history else {counts: 0, "seconds": 0.0}
    done, earlier = log.pop("since", (last[counts], last["seconds"]))
    if done < length:
        log["provenance"] = provenance()
    if last[counts] % every and done < length:  # a shorter run's last evaluation, off the schedule
        del history[-1], snapshots[-1]
    clock = time.process_time if torch.device(rng.device).type == "cpu" else time.perf_counter
    started, saved = clock(), time.perf_counter()

    def elapsed() -> float:
        return round(earlier + clock() - started, 1)

    def look(number: int) -> None:
        row, snapshot = evaluate(number, history)
        history.append({counts: number, **row, "seconds": elapsed()})
        snapshots.append(snapshot)

    def keep(log: Mapping[str, Any]) -> None:
        nonlocal saved
        if writes:
            save(path, settings, parts, rng, log)
        saved = time.perf_counter()

    progress = bar(config, line, iterable=range(done + 1, length + 1), initial=done)
    if not history:
        look(0)
    for number in progress:
        yield number
        if number % every == 0 or number == length:
            look(number)
            if number == length or time.perf_counter() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                keep(log)
        elif time.perf_counter() - saved > SECONDS_AT_RISK:
            keep({**log, "since": (number, elapsed())})


def cores(device: str = "cpu") -> int:
    return (os.cpu_count() or 1) if device == "cpu" else 1


def run_all(
    run: Callable[[Any, int], Any], settings: Sequence[Any], workers: int | None, device: str
) -> Iterator[Any]:
    """Yield results as runs finish; `run` gets its settings and a line for its progress bar."""
    workers = min(workers or cores(device), len(settings))
    for line, one in enumerate(settings[:workers]):
        bar(one, line).disable = True  # until its own is drawn over it, after imports and compiling
    if workers == 1:
        yield from (run(one, 0) for one in settings)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, tqdm.set_lock, (context.RLock(),))
    try:
        futures = [pool.submit(_on_own_line, run, one) for one in settings]
        yield from (future.result() for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def _on_own_line(run: Callable[[Any, int], Any], settings: Any) -> Any:
    number = multiprocessing.current_process().name.rpartition("-")[2]  # SpawnProcess-1 is first
    return run(settings, int(number) - 1)
