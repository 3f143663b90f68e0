"""Settings of the experiments, the command line made of them, and the code that runs it.

    study.main(__doc__, PRESETS, train, report, "record", {"unroll_steps": (0, 10)})

The flags are the fields of the experiment's dataclass that have a comment beside them; the comment
is the flag's help. Flags in `sweep` take several values, and every combination is trained. The last
flags are those of `Options`.
"""

import argparse
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, make_dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import pandas as pd
import torch
import tyro

from lab import columns, records, runs
from lab.records import RESULTS

FLAGS = {"data": "mixture", "peak_lr": "peak-learning-rate"}  # whose records have an older name
POSITIVE = re.compile("(_rate|r_steps|_every|samples|width|size|^pairs|^epochs|^members|^delay)$")


@dataclass(frozen=True)
class Settings:
    """The base of every experiment's settings: an error names a setting that cannot be trained."""

    preset: str = "paper"
    device: str = "cpu"
    grows: ClassVar[str] = "pairs"  # what a resumed run may have more of

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for name, value in asdict(self).items():
            flag = f"--{name.replace('_', '-')}"
            if name == "unroll_steps" and value < 0:
                raise ValueError(f"{flag} must not be negative, got {value}")
            if name == "ema" and not 0 <= value < 1:
                raise ValueError(f"{flag} must be at least 0 and below 1, got {value}")
            if POSITIVE.search(name) and isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{flag} must be positive, got {value}")

    @property
    def label(self) -> str:
        """Return the name of the setting in tables and figures."""
        return f"K = {self.unroll_steps}"

    @property
    def name(self) -> str:
        """Return the name of its checkpoint, without the folder."""
        setting = re.sub(r"[^\w.+]+", "-", self.label.replace(" = ", ""))
        return f"{setting}-{self.models}"

    @property
    def look_ahead(self) -> dict[str, Any]:
        """Return those of the settings that are arguments of `unroll.UnrolledGeneratorLoss`."""
        names = "unroll_steps", "stop_gradient", "average", "compile"
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def checkpoint(self, folder: Path) -> Path:
        return folder / "checkpoints" / f"{self.name}.pt"


@dataclass(frozen=True)
class OneModel(Settings):
    """The settings of a run that trains one model."""

    seed: int = 0

    @property
    def models(self) -> str:
        return f"seed{self.seed}"


@dataclass(frozen=True)
class SideBySide(Settings):
    """The settings of a run that trains the models of several seeds side by side."""

    first_seed: int = 0
    seeds: int = 1

    @property
    def models(self) -> str:
        return f"seeds{self.first_seed}+{self.seeds}"


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@dataclass(frozen=True)
class Options:
    """The runs: how many, where, and what is kept."""

    seeds: int = 1  # models of each setting
    first_seed: int = 0  # the others follow
    device: str = "cpu"  # cpu, cuda, cuda:1, mps
    workers: int | None = None  # processes: a core each on the cpu, else one
    out: Path = Path("runs")  # the folder of checkpoints, figures and time series
    resume: bool = False  # continue from the checkpoints there, to the same numbers
    force: bool = False  # begin anew where there are some
    record: bool = False  # append a row for each model to the record
    records: Path = RESULTS  # the folder of the records
    figures: Path | None = None  # the folder of the figures, if not that of --out


@dataclass(frozen=True)
class DataOptions(Options):
    """The data, and the runs."""

    data_root: Path | None = None  # of MNIST/raw or images; else $UNROLL_DATA or data/, downloaded


def described(given: Any) -> dict[str, tuple[Any, Any, str]]:
    """Return type, value and comment of the fields that have a comment beside them."""
    said: dict[str, str] = {}
    for base in reversed(type(given).__mro__[:-1]):
        said |= re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(base), re.MULTILINE)
    types, names = get_type_hints(type(given)), type(given).__match_args__
    return {name: (types[name], getattr(given, name), said[name]) for name in names if name in said}


def command_line(
    doc: str | None,
    presets: Mapping[str, Any],
    sweep: Mapping[str, Any],
    options: Options,
    arguments: Sequence[str] | None = None,
) -> tuple[Any, dict[str, Sequence[Any]], Options]:
    """Return the settings, the values of those in `sweep`, and the options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=presets, default=next(iter(presets)))
    preset = parser.parse_known_args(arguments)[0].preset
    base = presets[preset]
    own, of_runs = described(base), described(options)
    flags: dict[str, Any] = {
        "preset": (Literal[tuple(presets)], preset, "what all other flags start from")
    }
    flags |= own | of_runs
    for name, several in sweep.items():
        kind, value, said = flags[name]
        flags[name] = tuple[kind, ...], tuple(several or (value,)), said
    typed = [
        (name, Annotated[kind, tyro.conf.arg(name=FLAGS.get(name), help=said)], value)
        for name, (kind, value, said) in flags.items()
    ]
    command = make_dataclass("Command", typed)
    config = (tyro.conf.FlagCreatePairsOff,)
    chosen = vars(tyro.cli(command, description=doc, args=arguments, config=config))
    base = replace(base, **{name: chosen[name] for name in own if name not in sweep})
    options = replace(options, **{name: chosen[name] for name in of_runs})
    return base, {name: chosen[name] for name in sweep}, options


def configurations(base: Any, sweep: Mapping[str, Sequence[Any]], options: Options) -> list[Any]:
    """Return the settings of every run: those that train all seeds side by side are one."""
    if options.seeds < 1:
        raise ValueError(f"--seeds must be positive, got {options.seeds}")
    models = range(options.first_seed, options.first_seed + options.seeds)
    numbers: list[dict[str, int]] = [{"seed": seed} for seed in models]
    if isinstance(base, SideBySide):
        numbers = [{"seeds": options.seeds, "first_seed": options.first_seed}]
    arms = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
    return [replace(base, device=options.device, **arm, **n) for n in numbers for arm in arms]


def _carry_out(train: Callable[..., None], options: Options, config: Any, line: int) -> Any:
    torch.set_num_threads(1)  # a process a core
    train(config, options, line)
    return config


def _refuse_overwriting(configs: Sequence[Any], options: Options) -> None:
    for config in configs:
        path = config.checkpoint(options.out)
        if not path.exists() or (options.force and not options.resume):
            continue
        if not options.resume:
            raise ValueError(
                f"--out must not hold the run already, there is {path}: continue it with --resume, "
                "begin anew with --force, or give another folder"
            )
        runs.check(path, asdict(config), length=config.grows)


def _start_line(configs: Sequence[Any], options: Options, record: Path) -> str:
    """Say what is run, how long it took before, and where it is written."""
    first = configs[0]
    labels = ", ".join(dict.fromkeys(config.label for config in configs))
    length = f"{first.epochs:,} epochs" if hasattr(first, "epochs") else f"{first.pairs:,} pairs"
    models = f"{options.seeds} model{'s' * (options.seeds > 1)} of each"
    workers = min(options.workers or runs.cores(options.device), len(configs))
    seconds, more = zip(*(_seconds(config, record) for config in configs), strict=True)
    minutes, about = sum(seconds) / 60 / workers, "at most" if any(more) else "about"
    about = f"{about} {max(minutes, 1):,.0f} min on {workers} core{'s' * (workers > 1)}"
    source = f"measured in docs/results/{record.name}"
    about = "no time on record" if math.isnan(minutes) else f"{about}, {source}"
    ends = f"{models}, {length} ({about}). Written to {options.out}/."
    return f"Preset {first.preset}: {labels}; {ends}"


def _seconds(config: Any, record: Path) -> tuple[float, bool]:
    """Return how long a run took, by the record, and whether with more models side by side.

    Fewer models take less, though not in proportion. NaN stands for a record with no such run.
    """
    if not record.exists():
        return math.nan, False
    found, wanted = pd.read_csv(record), records.renamed(asdict(config))
    for name in ("preset", "unroll_steps", "game", "width", "size", "batch_size"):
        if name in found and name in wanted:
            found = found[found[name] == wanted[name]]
    length, times, more = "epochs" if "epochs" in wanted else "pairs", wanted.get("seeds", 1), False
    if "seeds_together" in found:
        far = (found["seeds_together"] - times).abs()
        found = found[far == far.min()]
        more = bool((found["seeds_together"] > times).any())
        times = (times / found["seeds_together"]).clip(lower=1)
    seconds = (found["seconds"] / found[length] * times).median() * wanted[length]
    return float(seconds), more


def models(config: Any, log: Mapping[str, Any]) -> list[tuple[int, list[dict[str, Any]]]]:
    """Return the seed and the history of every model of a run."""
    history = log["history"]
    if not isinstance(config, SideBySide):
        return [(config.seed, history)]
    each = zip(*(row["each"] for row in history), strict=True)
    shared = [{name: value for name, value in row.items() if name != "each"} for row in history]
    return [
        (seed, [row | one for row, one in zip(shared, own, strict=True)])
        for seed, own in enumerate(each, start=config.first_seed)
    ]


def model_rows(experiment: str, config: Any, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return settings, metrics and provenance of every model, with its part of the seconds."""
    settings = records.renamed(asdict(config))
    about = {"device": settings.pop("device"), **log["provenance"]}
    if isinstance(config, SideBySide):
        for shared in ("seeds", "first_seed", "compile"):
            settings.pop(shared, None)
    part = getattr(config, "seeds", 1)
    return [
        {"experiment": experiment, **settings, "seed": seed, **row, **about}
        | {"seconds": round(row["seconds"] / part, 2)}
        for seed, history in models(config, log)
        for row in history
    ]


def last_rows(experiment: str, config: Any, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that most experiments record: each model's last evaluation."""
    history = log["history"]
    together = {"seconds": history[-1]["seconds"]}
    if isinstance(config, SideBySide):
        together["seeds_together"] = config.seeds
    last = model_rows(experiment, config, log)[len(history) - 1 :: len(history)]
    return [row | together for row in last]


class Results:
    """What finished runs left behind: their settings, their logs, and tables of them."""

    def __init__(self, configs: Sequence[Any], options: Options) -> None:
        self.configs, self.options = configs, options
        self.logs = [runs.read_log(config.checkpoint(options.out)) for config in configs]
        self.folder = options.figures or options.out
        self.first = configs[0]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row for each evaluation of every model."""
        return pd.DataFrame(
            {"setting": config.label, "seed": seed} | row
            for config, log in zip(self.configs, self.logs, strict=True)
            for seed, history in models(config, log)
            for row in history
        )

    @property
    def last(self) -> pd.DataFrame:
        """The last row of every model."""
        return self.frame.groupby(["setting", "seed"], sort=False).tail(1)

    @property
    def first_logs(self) -> dict[str, Any]:
        """The log of each setting's first run."""
        found: dict[str, Any] = {}
        for config, log in zip(self.configs, self.logs, strict=True):
            found.setdefault(config.label, log)
        return found

    def only(self, chosen: Callable[[Any], bool]) -> "Results":
        """Return the results of the chosen settings."""
        return Results([config for config in self.configs if chosen(config)], self.options)

    def table(self, *names: str) -> None:
        """Print the means of the last metrics over models."""
        counts = self.last.groupby("setting")["seed"].transform("size")
        print(columns.table(self.last.assign(models=counts), ["models", *names]))

    def sentence(self, metric: str, text: str) -> str:
        return columns.sentence(self.last, metric, text)


def main(
    doc: str | None,
    presets: Mapping[str, Any],
    train: Callable[[Any, Options, int], None],
    report: Callable[["Results"], str],
    record: str | Callable[[Any], str],
    sweep: Mapping[str, Any],
    *,
    options: Options = Options(),
    arms: Callable[[list[Any], Options], list[Any]] | None = None,
    rows: Callable[[str, Any, Mapping[str, Any]], Iterable[dict[str, Any]]] = last_rows,
    leads: Callable[[], bool] = lambda: True,
    arguments: Sequence[str] | None = None,
) -> None:
    """Train what the command line asks for, record each run as it finishes, and report.

    Args:
        doc: The experiment's module docstring, which `--help` shows.
        presets: Settings by name; the first is the default.
        train: Given settings, options and the line of the progress bar, trains one run.
        report: Draws and prints the results, and returns a sentence.
        record: The name of the record, or a function from the options to it.
        sweep: The settings that take several values, with the default ones; None: the preset's.
        options: The defaults of the flags of the runs.
        arms: Changes the settings of the runs, if not every combination is a run.
        rows: Given the record's name, settings and log, returns the rows of the record.
        leads: Whether this process writes, if several train one model together.
        arguments: Replace those of the command line.
    """
    options = replace(options, out=options.out / Path(sys.argv[0]).stem)
    try:
        base, swept, options = command_line(doc, presets, sweep, options, arguments)
        torch.empty(0, device=options.device)
        configs = configurations(base, swept, options)
        with runs.bar(configs[0], leave=False):  # while data are read
            configs = list(dict.fromkeys(arms(configs, options) if arms else configs))
        _refuse_overwriting(configs, options)
        runs.check_writable("--out", options.out)
        if options.record:
            runs.check_writable("--records", options.records)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        runs.refuse(error)

    record = record if isinstance(record, str) else record(options)
    path = options.records / f"{record}.csv"
    if leads():
        print(_start_line(configs, options, RESULTS / f"{record}.csv"), flush=True)
        settings = {"command": sys.argv, **runs.provenance(), "runs": [asdict(c) for c in configs]}
        text = json.dumps(settings, indent=2) + "\n"
        runs.write_atomically(options.out / "config.json", lambda draft: draft.write_text(text))
    slowest = sorted(configs, key=lambda c: (getattr(c, "seed", 0), -c.unroll_steps))
    try:
        task = partial(_carry_out, train, options)
        for config in runs.run_all(task, slowest, options.workers, options.device):
            log = runs.read_log(config.checkpoint(options.out))
            for row in rows(record, config, log) if options.record and leads() else ():
                names = {*asdict(config), *records.RENAMED.values(), "lr", "seed", "revision"}
                records.append(path, row, key=[name for name in row if name in names])
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the same command with --resume continues.")
    except (FloatingPointError, OSError, ValueError) as error:
        sys.exit(
            f"\nStopped: {error}\nThe checkpoints in {options.out} are whole, --resume continues."
        )
    if not leads():
        return
    results = Results(configs, options)
    runs.write_atomically(
        options.out / "metrics.csv", partial(results.frame.to_csv, index=False, na_rep="nan")
    )
    print(f"\n{report(results)}")
    print(f"Figures, time series and checkpoints are in {results.folder}/.")
