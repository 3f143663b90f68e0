"""What all experiments share: settings, a command line made of them, and what carries it out.

    study.main(__doc__, PRESETS, train, report, "record", {"unroll_steps": (0, 10)})

The flags are the fields of the experiment's dataclass that have a comment beside them, which is
their help; those in `sweep` take several values, and every combination is trained. The last ones
are those of `Options`.
"""

import argparse
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, get_type_hints

import pandas as pd
import torch
import tyro

from lab import records, runs, seeds
from lab.columns import explained, moments, shown, title
from lab.records import RESULTS

POSITIVE = re.compile("(_rate|r_steps|_every|samples|width|size|^pairs|^epochs|^members|^delay)$")


@dataclass(frozen=True)
class Settings:
    """The base of every experiment's settings: it refuses what cannot be trained, and names it."""

    preset: str = "paper"
    device: str = "cpu"
    grows: ClassVar[str] = "pairs"  # what a resumed run may have more of

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for name, value in asdict(self).items():
            flag = f"--{name.replace('_', '-')}"
            if name == "unroll_steps" and value < 0:
                raise ValueError(f"{flag} must not be negative, got {value}")
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


def comments(kind: type) -> Mapping[str, str]:
    """Return the comments beside the fields of a dataclass."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+): .*?  # (.*)", line):
                found[match[1]] = match[2]
    return found


def command_line(
    doc: str | None,
    presets: Mapping[str, Any],
    sweep: Mapping[str, Any],
    options: Options,
    arguments: Sequence[str] | None = None,
) -> tuple[Any, dict[str, Any], dict[str, tuple[Any, ...]], Options]:
    """Return a preset, what the command line changes of it, the values of `sweep`, and options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=presets, default=next(iter(presets)))
    preset = parser.parse_known_args(arguments)[0].preset
    base = presets[preset]
    kind = Literal[tuple(presets)]
    flags = [("preset", Annotated[kind, tyro.conf.arg(help="what all other flags start from")])]
    defaults: dict[str, Any] = {"preset": preset}
    for given in (base, options):
        types, said = get_type_hints(type(given)), comments(type(given))
        for field in fields(given):
            if field.name not in said:
                continue
            kind, value = types[field.name], getattr(given, field.name)
            if field.name in sweep and given is base:
                several = sweep[field.name] or (value,)
                kind, value = tuple[kind, ...], tuple(several)  # type: ignore[valid-type]
            flags.append((field.name, Annotated[kind, tyro.conf.arg(help=said[field.name])]))
            defaults[field.name] = value
    command = make_dataclass("Command", flags, frozen=True)
    given = tyro.cli(
        command,
        default=command(**defaults),
        description=doc,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    chosen = {f.name: getattr(given, f.name) for f in fields(command)}
    own = {n: v for n, v in chosen.items() if n in type(base).__match_args__ and n not in sweep}
    swept = {name: chosen[name] for name in sweep}
    of_runs = {f.name: chosen[f.name] for f in fields(options) if f.name in chosen}
    return base, own, swept, replace(options, **of_runs)


def configurations(
    base: Any, own: Mapping[str, Any], sweep: Mapping[str, Sequence[Any]], options: Options
) -> list[Any]:
    """Return the settings of every run: those that train all seeds side by side are one."""
    own = dict(own) | {"device": options.device}
    if isinstance(base, SideBySide):
        own |= {"seeds": options.seeds, "first_seed": options.first_seed}
        numbers: Iterable[dict[str, Any]] = [{}]
    else:
        numbers = [{"seed": options.first_seed + number} for number in range(options.seeds)]
    arms = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
    return [replace(base, **own | arm | seed) for seed in numbers for arm in arms]


def pairs(
    config: Any,
    options: Options,
    line: int,
    parts: runs.Parts,
    rng: Any,
    evaluate: Callable[..., tuple[dict[str, Any], Any]],
    **more: Any,
) -> Iterator[int]:
    """Count the pairs of updates of a run, with evaluations and checkpoints between them."""
    counts = "epochs" if hasattr(config, "epochs") else "pairs"
    return runs.iterate(
        config.checkpoint(options.out),
        asdict(config),
        parts,
        rng,
        evaluate,
        length=getattr(config, counts),
        every=config.evaluate_every,
        resume=options.resume,
        bar={"desc": f"{config.label}, {config.models}", "position": line, "unit": counts[:-1]},
        counts=counts,
        **more,
    )


def main(
    doc: str | None,
    presets: Mapping[str, Any],
    train: Callable[[Any, Options, int], None],
    report: Callable[[Sequence[Any], Sequence[Mapping[str, Any]], Options], str],
    record: str | Callable[[Any], str],
    sweep: Mapping[str, Any],
    *,
    options: Options = Options(),
    arms: Callable[[list[Any], Options], list[Any]] | None = None,
    rows: Callable[[str, Any, Mapping[str, Any]], Iterable[dict[str, Any]]] | None = None,
    leads: Callable[[], bool] = lambda: True,
    arguments: Sequence[str] | None = None,
) -> None:
    """Train what the command line asks for, record each run as it finishes, and report.

    Args:
        doc: The experiment's own text, which `--help` shows.
        presets: Settings by name; the first is the default.
        train: Given settings, options and the line of the progress bar, trains one run.
        report: Given settings, their logs and the options, draws, prints and returns a sentence.
        record: The name of the record, or what it is for given options.
        sweep: The settings that take several values, with the default ones; None: the preset's.
        options: With which the flags of the runs start.
        arms: Changes the settings of the runs, where not every combination makes one.
        rows: Given the record's name, settings and log, returns the rows of the record.
        leads: Whether this process, of several that train one model together, writes.
        arguments: In place of the command line's.
    """
    options = replace(options, out=options.out / Path(sys.argv[0]).stem)
    base, own, swept, options = command_line(doc, presets, sweep, options, arguments)
    try:
        torch.empty(0, device=options.device)
        configs = configurations(base, own, swept, options)
        configs = list(dict.fromkeys(arms(configs, options) if arms else configs))
        _refuse_overwriting(configs, options)
        check_writable("--out", options.out)
        if options.record:
            check_writable("--records", options.records)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        refuse(error)

    record = record if isinstance(record, str) else record(options)
    path = options.records / f"{record}.csv"
    if leads():
        print(_start_line(configs, options, RESULTS / f"{record}.csv"), flush=True)
        settings = {"command": sys.argv, **runs.provenance(), "runs": [asdict(c) for c in configs]}
        records.write_json(options.out / "config.json", settings)
    rows = rows or default_rows
    slowest = sorted(configs, key=lambda c: (getattr(c, "seed", 0), -c.unroll_steps))
    try:
        task = partial(_carry_out, train, options)
        for config in runs.run_all(task, slowest, options.workers, options.device):
            log = runs.read_log(config.checkpoint(options.out))
            for row in rows(record, config, log) if options.record and leads() else ():
                names = [*asdict(config), *records.RENAMED.values(), "seed", "pairs", "revision"]
                records.append(path, row, key=[name for name in names if name in row])
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the same command with --resume continues.")
    except (FloatingPointError, OSError, ValueError) as error:
        sys.exit(
            f"\nStopped: {error}\nThe checkpoints in {options.out} are whole, --resume continues."
        )
    if not leads():
        return
    logs = [runs.read_log(config.checkpoint(options.out)) for config in configs]
    records.write(options.out / "metrics.csv", series(configs, logs))
    print(f"\n{report(configs, logs, options)}")
    print(f"Figures, time series and checkpoints are in {options.figures or options.out}/.")


def _carry_out(train: Callable[..., None], options: Options, config: Any, line: int) -> Any:
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


def refuse(error: Exception) -> NoReturn:
    """Stop before any work, and say why."""
    print(f"error: {error}", file=sys.stderr)
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


def _start_line(configs: Sequence[Any], options: Options, record: Path) -> str:
    """Say what is run, how long it took before, and where it is written."""
    first = configs[0]
    labels = ", ".join(dict.fromkeys(config.label for config in configs))
    length = f"{first.epochs:,} epochs" if hasattr(first, "epochs") else f"{first.pairs:,} pairs"
    models = f"{options.seeds} model{'s' * (options.seeds > 1)} of each"
    seconds = sum(_seconds(config, record) for config in configs)
    cores = options.workers or runs.cores(options.device)
    minutes = seconds / 60 / min(cores, len(configs))
    about = f"about {max(minutes, 1):,.0f} min here before" if minutes == minutes else "no record"
    ends = f"{models}, {length} ({about}). Written to {options.out}/."
    return f"Preset {first.preset}: {labels}; {ends}"


def _seconds(config: Any, record: Path) -> float:
    """Return how long a run took, by the record; NaN where there is none like it."""
    if not record.exists():
        return float("nan")
    found, wanted = pd.read_csv(record), records.renamed(asdict(config))
    for name in ("preset", "unroll_steps", "game", "width", "size"):
        if name in found and name in wanted:
            found = found[found[name] == wanted[name]]
    length = "epochs" if "epochs" in wanted else "pairs"
    if found.empty or length not in wanted:
        return float("nan")
    together = found.get("seeds_together", 1)  # models that the seconds are of
    per_model = (found["seconds"] / found[length] / together).median()
    return float(per_model * wanted[length] * wanted.get("seeds", 1))


def default_rows(record: str, config: Any, log: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "each" in log["history"][-1]:
        return seeds.record_rows(record, config, log)
    return [records.row(record, config, log["history"][-1], log)]


def series(configs: Sequence[Any], logs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all settings and models over training."""
    return [
        {"setting": config.label, "seed": seed} | row
        for config, log in zip(configs, logs, strict=True)
        for seed, history in models(config, log)
        for row in history
    ]


def models(config: Any, log: Mapping[str, Any]) -> list[tuple[int, list[dict[str, Any]]]]:
    if "each" in log["history"][-1]:
        return list(enumerate(seeds.histories(log), start=config.first_seed))
    return [(config.seed, log["history"])]


def histories(
    configs: Sequence[Any], logs: Sequence[Mapping[str, Any]]
) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the histories of all models by the label of their setting."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for config, log in zip(configs, logs, strict=True):
        found.setdefault(config.label, []).extend(history for _, history in models(config, log))
    return found


def first_logs(configs: Sequence[Any], logs: Sequence[Any]) -> dict[str, Any]:
    """Return the log of each setting's first run."""
    found: dict[str, Any] = {}
    for config, log in zip(configs, logs, strict=True):
        found.setdefault(config.label, log)
    return found


def table(by_label: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], *columns: str) -> None:
    """Print the last metrics of each setting, means with standard errors, and what they mean."""
    lines = [["", "models", *map(title, columns)]]
    for label, own in by_label.items():
        last = [[history[-1][name] for history in own] for name in columns]
        lines.append([label, str(len(own)), *map(shown, last)])
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        print("".join(map(str.rjust, line, widths)))
    print(f"\n{explained(columns)}")


def sentence(
    by_label: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], metric: str, text: str
) -> str:
    """Return a sentence on the mean of a metric: "K = 0 holds 1 of 8 modes, K = 10 8"."""
    means = {k: moments([history[-1][metric] for history in own])[0] for k, own in by_label.items()}
    found = [f"{label} {text.format(f'{mean:.3g}')}" for label, mean in means.items()]
    return ", ".join(found) + "."
