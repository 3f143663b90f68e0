"""Time pairs of updates of an experiment on MNIST, one for each request.

It runs with the code of any revision on the path, and therefore imports little of it.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lab import runs
from lab.data import colors, digits

SAMPLE, STACKS = (digits.Digits, "sample"), (digits.Digits, "stacks")
DATA = SAMPLE, STACKS, (colors, "draw"), (colors, "coloured")


def serve(name: str, preset: str, own: dict[str, Any], files: dict[str, str]) -> None:
    """Time a pair for every line of input; the first line of output is about the settings."""
    torch.set_num_threads(1)  # as a worker has
    module, of_data = importlib.import_module(name), list[float]()
    base = module.PRESETS[preset]
    config = replace(base, **{n: v for n, v in own.items() if n in type(base).__match_args__})
    config = module.own(config) if name == "gan_mnist" else config
    about = {"batch_size": config.batch_size, "preset_pairs": config.pairs, **runs.provenance()}
    print(json.dumps({**about, "models": getattr(config, "seeds", 1)}), flush=True)

    def iterate(*_: Any, **__: Any) -> Iterator[int]:
        for pair, _ in enumerate(sys.stdin, start=1):
            began = time.process_time()
            of_data.clear()
            yield pair
            print(json.dumps([time.process_time() - began, sum(of_data)]), flush=True)

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            found = function(*args, **kwargs)
            of_data.append(time.process_time() - began)
            return found

        return call

    paths = {n: Path(path) for n, path in files.items()}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(runs, "iterate", iterate))
        for owner, function in DATA:
            made = clocked(getattr(owner, function))
            stack.enter_context(mock.patch.object(owner, function, made))
        names = type(module.Options()).__match_args__
        given = {n: path for n, path in paths.items() if n in names}
        module.train(config, replace(module.Options(), **given), 0)
