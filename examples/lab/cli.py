"""The flags that every experiment has."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab import records, runs
from lab.records import RESULTS


def positive(text: str) -> int:
    """Parse a count that must be at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_run_flags(
    parser: argparse.ArgumentParser, experiment: str, *, seeds: int = 1, figures: bool = False
) -> None:
    """Add what concerns the runs and not the method: seeds, device, processes, files."""
    add = parser.add_argument_group("the runs").add_argument
    add(
        "--seeds",
        type=positive,
        default=seeds,
        metavar="N",
        help="runs of each setting (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="the first seed, others follow (default: 0)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    add(
        "--workers",
        type=positive,
        metavar="N",
        help="processes (default: one a core on cpu, else one)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs", experiment),
        metavar="FOLDER",
        help="where everything is written (default: %(default)s)",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the checkpoints in --out, to the same numbers as without interruption; "
        "finished runs are kept, and are extended by more --iterations",
    )
    add(
        "--record",
        type=Path,
        nargs="?",
        const=RESULTS / f"{experiment}.csv",
        metavar="FILE",
        help=f"append one row a finished run to FILE (default: docs/results/{experiment}.csv)",
    )
    if figures:
        add(
            "--figures",
            type=Path,
            nargs="?",
            const=RESULTS.parent / "figures",
            metavar="FOLDER",
            help="where the figures go (default: --out; without FOLDER: docs/figures)",
        )


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


def carry_out(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    build: Callable[[dict[str, Any]], Sequence[Any]],
    train: Callable[..., Any],
    rows: Callable[[Any, dict[str, Any]], Iterable[dict[str, Any]]],
    *,
    length: str = "pairs",
    keep: bool = False,
) -> list[Any]:
    """Train what the command line asks for, and record each run as it finishes.

    Args:
        parser: Where wrong arguments are reported, before any work.
        args: The command line.
        build: Given the command line's values, returns the configurations.
        train: Called with a configuration and the line of its progress bar.
        rows: Given a configuration and its log, returns the rows of its record.
        length: The setting that a resumed run may have more of.
        keep: Whether to refuse to begin anew a run that has a checkpoint.
    """
    try:
        torch.empty(0, device=args.device)
        configs = build({name: value for name, value in vars(args).items() if value is not None})
        for config in configs:
            path = config.checkpoint(args.out)
            if args.resume and path.exists():
                runs.check(path, asdict(config), length=length)
            elif keep and path.exists():
                raise ValueError(
                    f"--out must not hold the run already, there is {path}: continue it with "
                    "--resume, or give another folder"
                )
        check_writable("--out", args.out)
        if args.record is not None:
            check_writable("--record", args.record.parent)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))

    settings = {"command": sys.argv, **runs.provenance(), "runs": [asdict(c) for c in configs]}
    records.write_json(args.out / "config.json", settings)
    task = partial(train, folder=args.out, resume=args.resume)
    slowest_first = sorted(configs, key=lambda config: -config.unroll_steps)
    try:
        for config in runs.run_all(task, slowest_first, args.workers, args.device):
            log = runs.read_log(config.checkpoint(args.out))
            for row in rows(config, log) if args.record is not None else ():
                names = [*asdict(config), "seed", "torch", "revision"]
                key = [name for name in dict.fromkeys(names) if name in row]
                records.append(args.record, row, key=key)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the same command with --resume continues.")
    except (FloatingPointError, OSError) as error:
        sys.exit(
            f"\nStopped: {error}\nThe checkpoints in {args.out} are whole, --resume continues."
        )
    return list(configs)
