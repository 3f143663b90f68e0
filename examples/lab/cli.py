"""The flags that every experiment has."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
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


def check(config: Any, **flags: str) -> None:
    """Refuse a negative number of look-ahead steps, and other settings that are not positive.

    Args:
        config: The settings.
        flags: The name on the command line of each of the others.
    """
    if config.unroll_steps < 0:
        raise ValueError(f"--unroll-steps must not be negative, got {config.unroll_steps}")
    for name, flag in flags.items():
        if getattr(config, name) <= 0:
            raise ValueError(f"--{flag} must be positive, got {getattr(config, name)}")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a command line that is explained by the docstring of its script."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_unroll_steps(
    add: Callable[..., object],
    *default: int,
    nargs: str = "+",
    text: str = "look-ahead steps of D in the generator's loss; 0 is the ordinary one",
) -> None:
    """Add the numbers of look-ahead steps, each of which is trained."""
    add(
        "--unroll-steps",
        dest="steps",
        type=int,
        nargs=nargs,
        default=list(default),
        metavar="K",
        help=f"{text} (default: {' '.join(map(str, default))})",
    )


def add_iterations(
    add: Callable[..., object],
    text: str = "of one D and one G update",
    *,
    metavar: str = "PAIRS",
) -> None:
    """Add the length of the training."""
    add(
        "--iterations",
        dest="pairs",
        type=int,
        metavar=metavar,
        help=f"{text} (default: the preset's)",
    )


def chosen(given: Mapping[str, Any], presets: Mapping[str, Any]) -> Any:
    """Return the preset that the command line names, with the settings that it gives."""
    preset = presets[given["preset"]]
    names = type(preset).__match_args__
    seed = {"first_seed": given["seed"]} if "first_seed" in names else {}
    known = {name: value for name, value in given.items() if name in names}
    return replace(preset, **known | seed)


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

    def order(config: Any) -> tuple[int, int]:  # whole seeds, and of each the slowest run first
        return getattr(config, "seed", 0), -config.unroll_steps

    try:
        for config in runs.run_all(task, sorted(configs, key=order), args.workers, args.device):
            log = runs.read_log(config.checkpoint(args.out))
            for row in rows(config, log) if args.record is not None else ():
                names = [*asdict(config), "seed", "torch", "revision"]
                key = [name for name in dict.fromkeys(names) if name in row]
                records.append(args.record, row, key=key)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the same command with --resume continues.")
    except (FloatingPointError, OSError, ValueError) as error:
        sys.exit(
            f"\nStopped: {error}\nThe checkpoints in {args.out} are whole, --resume continues."
        )
    return list(configs)


def written(args: argparse.Namespace, figures: Path) -> None:
    """Say where everything is."""
    print(f"\nTime series, settings and checkpoints are in {args.out}/, figures in {figures}/")
