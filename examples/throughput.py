"""What the experiments on MNIST cost here: seconds a pair of updates, and of its data.

For each experiment, preset and K: pairs of one D and one G update are timed, in seconds of the
process on one core, and so is the making of their real batches (stacking, colouring), which is to
be below 2 % of a pair with K=0. The projected cost of a preset is a run of all its pairs, without
the evaluations.

    python examples/throughput.py --record
    python examples/throughput.py --experiments stacked_mnist --presets paper --pairs 50
"""

import argparse
import importlib
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lab import cli, records, runs
from lab.data import colors, digits
from lab.metrics import classifier

WARM_UP = 2
STEPS = {
    "stacked_mnist": (0, 1, 5, 10),
    "colored_mnist": (0, 1, 5, 10),
    "gan_mnist": (0, 5),
    "rnn_mnist": (0, 20),
}
PRESETS = "small", "paper"
DATA = (
    (digits.Digits, "sample"),
    (digits.Digits, "stacks"),
    (colors, "draw"),
    (colors, "coloured"),
)


class Clock:
    """Adds up the seconds that functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began

        return call


def measured(
    module: Any, config: Any, pairs: int, most_seconds: float, **files: Path | None
) -> dict[str, float]:
    """Return how many pairs were timed, and the median of their seconds and of their data's.

    Args:
        module: An experiment, with `train`.
        config: Its settings.
        pairs: How many are timed.
        most_seconds: None is begun after that.
        files: `data_root` and `classifier_file`.
    """
    clock, seconds, of_data = Clock(), [], []

    def iterate(*_: Any, **__: Any) -> Iterator[int]:
        started = time.process_time()
        for pair in range(1, WARM_UP + pairs + 1):
            began, clock.seconds = time.process_time(), 0.0
            yield pair
            if pair > WARM_UP:
                seconds.append(time.process_time() - began)
                of_data.append(clock.seconds)
            if seconds and time.process_time() - started > most_seconds:
                break

    wanted = inspect.signature(module.train).parameters
    files = {name: path for name, path in files.items() if name in wanted}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(runs, "iterate", iterate))
        for owner, name in DATA:
            stack.enter_context(mock.patch.object(owner, name, clock.timed(getattr(owner, name))))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        module.train(config, 0, folder=folder, resume=False, **files)
    return {
        "pairs": len(seconds),
        "seconds_a_pair": statistics.median(seconds),
        "data_seconds_a_pair": statistics.median(of_data),
    }


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure what the command line asks for, a row an experiment, preset and K."""
    provenance = runs.provenance()
    for name in args.experiments:
        module = importlib.import_module(name)
        for preset in args.presets:
            for k in STEPS[name]:
                config = replace(module.PRESETS[preset], unroll_steps=k)
                found = measured(
                    module, config, args.pairs, args.most_seconds,
                    data_root=args.data_root, classifier_file=args.classifier,
                )  # fmt: skip
                yield {
                    "experiment": name,
                    "preset": preset,
                    "unroll_steps": k,
                    "batch_size": config.batch_size,
                    "preset_pairs": config.pairs,
                    **found,
                    "images_a_second": config.batch_size / found["seconds_a_pair"],
                    "cores": torch.get_num_threads(),
                    "device": "cpu",
                    **provenance,
                }


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--experiments", choices=STEPS, nargs="+", default=list(STEPS), help="default: all")
    add("--presets", choices=PRESETS, nargs="+", default=PRESETS, help="default: all")
    add("--pairs", type=cli.positive, default=10, metavar="N", help="to time (default: 10)")
    add(
        "--most-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="none is begun after that many, but one is timed (default: 20)",
    )
    add(
        "--record",
        type=Path,
        nargs="?",
        const=records.RESULTS / "throughput.csv",
        metavar="FILE",
        help="append the rows to FILE (default: docs/results/throughput.csv)",
    )
    digits.add_data_flag(parser)
    classifier.add_classifier_flag(parser)
    return parser


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = arguments()
    args = parser.parse_args(given)
    try:
        digits.mnist(args.data_root)
        classifier.load(args.classifier)
        if args.record is not None:
            cli.check_writable("--record", args.record.parent)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    for row in rows(args):
        share = row["data_seconds_a_pair"] / row["seconds_a_pair"]
        print(
            f"{row['experiment']}, {row['preset']}, K = {row['unroll_steps']}: "
            f"{1e3 * row['seconds_a_pair']:.1f} ms a pair, data {100 * share:.2f} %, "
            f"{row['images_a_second']:,.0f} images/s",
            flush=True,
        )
        if args.record is not None:
            key = ("experiment", "preset", "unroll_steps", "batch_size", "torch", "revision")
            records.append(args.record, row, key=key)


if __name__ == "__main__":
    main()
