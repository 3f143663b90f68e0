"""What the experiments on MNIST cost here: seconds a pair of updates, and of its data.

For each experiment, preset and K: pairs of one D and one G update are timed, in seconds of the
process on one core, and so is the making of their real batches (stacking, colouring), which is to
be below 2 % of a pair with K = 0.

    python examples/throughput.py --record
    python examples/throughput.py --experiments stacked_mnist --presets paper --timed 50
"""

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import tyro
from lab import records, runs, study
from lab.data import colors, digits
from lab.metrics import classifier

WARM_UP = 2
STEPS = {
    "stacked_mnist": (0, 1, 5, 10),
    "colored_mnist": (0, 1, 5, 10),
    "gan_mnist": (0, 5),
    "rnn_mnist": (0, 20),
}
DATA = (
    (digits.Digits, "sample"),
    (digits.Digits, "stacks"),
    (colors, "draw"),
    (colors, "coloured"),
)
KEY = ("experiment", "preset", "unroll_steps", "batch_size", "torch", "revision")


@dataclass(frozen=True)
class Options(classifier.Options):
    """What is timed."""

    experiments: tuple[Literal[tuple(STEPS)], ...] = tuple(STEPS)
    presets: tuple[Literal["small", "paper"], ...] = ("small", "paper")
    timed: int = 10
    """Pairs to time."""
    most_seconds: float = 20.0
    """None is begun after that many, but one is timed."""


class Clock:
    """Adds up the seconds that functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began

        return call


def measured(module: Any, config: Any, options: Options) -> dict[str, float]:
    """Return how many pairs were timed, and the median of their seconds and of their data's."""
    clock, seconds, of_data = Clock(), [], []

    def pairs(*_: Any, **__: Any) -> Iterator[int]:
        started = time.process_time()
        for pair in range(1, WARM_UP + options.timed + 1):
            began, clock.seconds = time.process_time(), 0.0
            yield pair
            if pair > WARM_UP:
                seconds.append(time.process_time() - began)
                of_data.append(clock.seconds)
            if seconds and time.process_time() - started > options.most_seconds:
                break

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(study, "pairs", pairs))
        for owner, name in DATA:
            stack.enter_context(mock.patch.object(owner, name, clock.timed(getattr(owner, name))))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        own = {"data_root": options.data_root, "classifier": options.classifier, "out": folder}
        names = type(module.Options()).__match_args__
        given = {name: value for name, value in own.items() if name in names}
        module.train(config, replace(module.Options(), **given), 0)
    return {
        "pairs": len(seconds),
        "seconds_a_pair": statistics.median(seconds),
        "data_seconds_a_pair": statistics.median(of_data),
    }


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """Measure what the command line asks for, a row an experiment, preset and K."""
    provenance = runs.provenance()
    for name in options.experiments:
        module = importlib.import_module(name)
        for preset in options.presets:
            for k in STEPS[name]:
                config = replace(module.PRESETS[preset], unroll_steps=k)
                config = module.own(config) if name == "gan_mnist" else config
                found = measured(module, config, options)
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


def main(arguments: Sequence[str] | None = None) -> None:
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, description=__doc__, args=arguments, config=config)
    try:
        classifier.prepared(options)
    except (OSError, RuntimeError, ValueError) as error:
        study.refuse(error)
    for row in rows(options):
        share = row["data_seconds_a_pair"] / row["seconds_a_pair"]
        print(
            f"{row['experiment']}, {row['preset']}, K = {row['unroll_steps']}: "
            f"{1e3 * row['seconds_a_pair']:.1f} ms a pair, data {100 * share:.2f} %, "
            f"{row['images_a_second']:,.0f} images/s",
            flush=True,
        )
        if options.record:
            records.append(options.records / "throughput.csv", row, key=KEY)


if __name__ == "__main__":
    main()
