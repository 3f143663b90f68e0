"""What the experiments on MNIST cost here: seconds for a pair of updates, and for its data.

For each experiment, preset and K, the script times pairs of one D and one G update, in CPU seconds
on one core. It also times the making of their real batches (stacking, colouring), which should take
less than 2 % of a pair with K = 0. If models are trained side by side, the times are those of one.

    python examples/throughput.py --record
    python examples/throughput.py --experiment stacked_mnist --preset paper --pairs 50
    python examples/throughput.py --against ../another/checkout
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import tyro
from lab import columns, records, runs, timed
from lab.metrics import classifier
from tqdm import tqdm

EXAMPLES = Path(__file__).resolve().parent
WARM_UP = 3
STEPS = {
    "stacked_mnist": (0, 1, 5, 10),
    "colored_mnist": (0, 1, 5, 10),
    "gan_mnist": (0, 5),
    "rnn_mnist": (0, 20),
}
KEY = ("experiment", "preset", "unroll_steps", "batch_size", "torch", "revision")


@dataclass(frozen=True)
class Options:
    """What is timed, with which files."""

    data_root: Path | None = None  # of MNIST/raw; else $UNROLL_DATA or data/, downloaded
    classifier: Path | None = None  # tells digits apart; else $UNROLL_CLASSIFIER, else trained once
    record: bool = False  # append the rows to the record
    records: Path = records.RESULTS  # the folder of the records
    experiment: tuple[Literal[tuple(STEPS)], ...] = tuple(STEPS)
    preset: tuple[Literal["small", "paper"], ...] = ("small", "paper")
    unroll_steps: tuple[int, ...] = ()  # look-ahead steps, if not those of the experiment
    batch_size: tuple[int, ...] = ()  # those to time, if not the preset's
    seeds: int = 8  # models that are trained side by side, where the experiment can
    against: Path | None = None  # a checkout whose pairs are timed by turns with these
    pairs: int = 10  # that are timed
    most_seconds: float = 20.0  # no pair is begun after that many, but one is timed


def server(root: Path, *given: Any) -> subprocess.Popen[str]:
    """Start a process that times pairs with the code of a checkout."""
    path = str(root / "examples"), str(root)
    code = f"import runpy, sys; sys.path[:0] = {path}; runpy.run_path({timed.__file__!r})"
    code += f"['serve'](*{given!r})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], text=True, **pipes)


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """Measure the requested pairs, one row for each experiment, preset, K and revision."""
    for name in options.experiment:
        steps, sizes = options.unroll_steps or STEPS[name], options.batch_size or (None,)
        for preset, k, size in product(options.preset, steps, sizes):
            own = {"unroll_steps": k, "seeds": options.seeds}
            own |= {"batch_size": size} if size else {}
            with tempfile.TemporaryDirectory() as folder:
                for about, seconds in by_turns(options, name, preset, own, folder):
                    models = about.pop("models")
                    pair, data = (
                        statistics.median(each) / models for each in zip(*seconds, strict=True)
                    )
                    yield {
                        "experiment": name,
                        "preset": preset,
                        "unroll_steps": k,
                        **about,
                        "pairs": len(seconds),
                        "seconds_a_pair": pair,
                        "data_seconds_a_pair": data,
                        "images_a_second": about["batch_size"] / pair,
                        "cores": 1,
                        "device": "cpu",
                    }


def by_turns(
    options: Options, name: str, preset: str, own: dict[str, Any], folder: str
) -> list[tuple[dict[str, Any], list[list[float]]]]:
    """Return facts about each side, and the seconds of its pairs and of their data."""
    files = {"data_root": options.data_root, "classifier": options.classifier, "out": folder}
    given = name, preset, own, {n: str(path) for n, path in files.items() if path}
    roots = [EXAMPLES.parent, *([options.against] if options.against else [])]
    with ExitStack() as stack:
        sides = [stack.enter_context(server(root, *given)) for root in roots]
        read = [json.loads(side.stdout.readline()) for side in sides]
        seconds: list[list[list[float]]] = [[] for _ in sides]
        began = time.perf_counter()
        for turn in range(WARM_UP + options.pairs):
            for side, found in zip(sides, seconds, strict=True):
                print(file=side.stdin, flush=True)
                found.append(json.loads(side.stdout.readline()))
            if turn < WARM_UP:
                began = time.perf_counter()
            elif time.perf_counter() - began > options.most_seconds:
                break
        for side in sides:
            side.communicate()
    return [(about, found[WARM_UP:]) for about, found in zip(read, seconds, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, description=__doc__, args=arguments, config=config)
    try:
        classifier.prepared(options)
    except (OSError, RuntimeError, ValueError) as error:
        runs.refuse(error)
    found = []
    for row in tqdm(rows(options), unit="setting"):
        named = "{experiment}, {preset}, K = {unroll_steps}, {revision}".format_map(row)
        found.append(row | {"setting": named})
        if options.record:
            records.append(options.records / "throughput.csv", row, key=KEY)
    frame = pd.DataFrame(found)
    measured = "seconds_a_pair", "data_seconds_a_pair", "images_a_second"
    print(columns.table(frame, ["batch_size", "pairs", *measured]))
    share = (frame["data_seconds_a_pair"] / frame["seconds_a_pair"]).max()
    print(f"\nIts data take at most {100 * share:.2g} % of a pair.")


if __name__ == "__main__":
    main()
