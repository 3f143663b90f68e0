"""The flags that every experiment has."""

import argparse
from pathlib import Path

from lab.records import RESULTS


def positive(text: str) -> int:
    """Parse a count that must be at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_run_flags(parser: argparse.ArgumentParser, experiment: str) -> None:
    """Add what concerns the runs and not the method: seeds, device, processes, files."""
    add = parser.add_argument_group("the runs").add_argument
    add("--seeds", type=positive, default=1, metavar="N", help="runs of each setting (default: 1)")
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
