"""How the tests run the experiments."""

import csv
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
TIMINGS = {"seconds", "cpu_seconds", "seconds_a_pair", "data_seconds_a_pair", "images_a_second"}
if str(ROOT / "examples") not in sys.path:
    sys.path.append(str(ROOT / "examples"))


def example(name: str) -> Any:
    """Return an experiment, or a module of what they share."""
    return importlib.import_module(name)


def rows(path: Path) -> list[dict[str, str]]:
    """Return a record, without what took how long."""
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in TIMINGS}
            for row in csv.DictReader(file)
        ]


def command(name: str, folder: Path, *arguments: object) -> str:
    """Run an experiment in this process, with its checkpoints and records in a folder."""
    own = ["--out", folder / "out", "--records", folder, "--workers", 1]
    if getattr(next(iter(example(name).PRESETS.values())), "compile", False):
        own.append("--no-compile")  # which takes half a minute
    example(name).main(arguments=list(map(str, (*arguments, *own))))
    return str(folder / "out")


def refused(name: str, folder: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the error of a command that must do nothing."""
    with pytest.raises(SystemExit) as stopped:
        command(name, folder, *arguments)
    assert stopped.value.code == 2
    assert not (folder / "out").exists()
    return capsys.readouterr().err


def trained(name: str, folder: Path, *lengths: int, options: Any = None, **settings: Any) -> Any:
    """Train to each length, resuming, and return what the checkpoint holds, without timings."""
    module, study = example(name), example("lab.study")
    base = next(iter(module.PRESETS.values()))
    length = "epochs" if hasattr(base, "epochs") else "pairs"
    options = replace(options or study.Options(), out=folder)
    if hasattr(base, "compile"):
        base = replace(base, compile=False)
    for number, until in enumerate(lengths):
        config = replace(base, **settings, **{length: until})
        module.train(config, replace(options, resume=number > 0), 0)
    content = torch.load(config.checkpoint(folder), weights_only=True)
    for row in content["log"]["history"]:
        for own in (row, *row.get("each", ())):
            for timing in TIMINGS & own.keys():
                del own[timing]
    return content


def same(one: Any, other: Any) -> None:
    """Check that two checkpoints hold the same numbers, bit by bit."""
    assert str(one["log"]["history"]) == str(other["log"]["history"])  # of NaNs too
    assert torch.equal(one["rng"], other["rng"])
    for part, state in one["parts"].items():
        if part == "trace":  # it holds times, too
            continue
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, other["parts"][part][key]), (part, key)
