"""Whether the self-checks tell right from wrong, over the zoo and a table of planted faults.

    python -m tests.verification.self_check                   all rows; fails if one is false
    python -m tests.verification.self_check --record          into docs/results/self_check.csv
    python -m tests.verification.self_check --only dropout    rows with that in their name
    python -m tests.verification.self_check --missing         rows that are not on record

Every discriminator that the tests support is checked by `check_gradients` and `check_step` under
SGD, an Adam after five steps and a fresh Adam, in float32 where its code allows: "right" is asked
of SGD always, of trained Adam for 95 % of the rows, and "wrong" is never allowed. Every planted
fault must be "wrong", with words that name it, by the check that can see it, under SGD and a
trained Adam. A loss that refuses the fault in its own words counts as "wrong".
"""

import argparse
import csv
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import unroll
from tests.matrix import DISCRIMINATORS
from tests.players import train
from tests.settings import DEVICE, randn
from tests.verification.planted import FAULTS, Built, mlp
from tests.zoo import Animal

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "self_check.csv"
SEED, STEPS, SAMPLES = 0, 2, 5
OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], int]] = {
    "SGD": (lambda parameters: torch.optim.SGD(parameters, lr=0.02), 2),
    "trained Adam": (lambda parameters: torch.optim.Adam(parameters, lr=1e-3), 5),
    "fresh Adam": (lambda parameters: torch.optim.Adam(parameters, lr=1e-3), 0),
}
CHECKS = ("gradients", "step")
DOUBLE = {"complex weights as real ones"}  # their code names float64 or complex128
DCGAN = "a small DCGAN, seed "


def _dcgan() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(1024, 1),
    )  # fmt: skip


ZOO = {name: animal for name, animal in DISCRIMINATORS.items() if isinstance(animal, Animal)}
ZOO |= {f"{DCGAN}{seed}": Animal(_dcgan, (3, 32, 32)) for seed in range(3)}
LARGE = {name for name, animal in ZOO.items() if animal.shape == (3, 32, 32)}  # they come last
Case = tuple[str, str, str, str]  # "right" or "wrong" is expected, the name, optimizer, check


def cases() -> list[Case]:
    """Return all rows."""
    right = [("right", name, o, check) for name in ZOO for o in OPTIMIZERS for check in CHECKS]
    trained = [o for o in OPTIMIZERS if o != "fresh Adam"]
    wrong = [("wrong", name, o, FAULTS[name][0]) for name in FAULTS for o in trained]
    fresh = ("wrong", "half the loss", "fresh Adam", "step")
    return [*wrong, fresh, *sorted(right, key=lambda case: case[1] in LARGE)]


def _single(value: Any) -> Any:
    return value.float() if value.is_floating_point() else value


def supported(name: str, build: Any, steps: int) -> tuple[Built, Any, Any]:
    """Return a supported game after real steps of D, and a batch."""
    animal = ZOO[name]
    d, cast = animal.make(), name not in DOUBLE
    built = Built(build, d.float() if cast else d)
    built.game = animal.objective

    def draw() -> Any:
        batch = animal.feed(randn(SAMPLES, *animal.shape))
        return unroll._functional.map_tensors(_single, batch) if cast else batch

    train(d, built.optimizer, [(draw(), draw()) for _ in range(steps)], animal.objective)
    return built, draw(), draw()


def planted(name: str, build: Any, steps: int) -> tuple[Built, Any, Any]:
    """Return a game with a fault, after real steps of D, and a batch."""
    built = Built(build, mlp())
    FAULTS[name][1](built)
    pairs = [(torch.randn(8, 3, device=DEVICE), torch.randn(8, 3, device=DEVICE) + 1)] * steps
    own = unroll.Criterion(nn.BCEWithLogitsLoss())
    if "zero_grad" not in name:
        train(built.d, built.optimizer, pairs, own)
        built.d.zero_grad()
    return built, torch.randn(8, 3, device=DEVICE), torch.randn(8, 3, device=DEVICE) + 1


def answer(case: Case) -> dict[str, str]:
    """Return a row: what a check says of a game."""
    expected, name, optimizer, check = case
    torch.set_num_threads(1)
    torch.manual_seed(int(name.removeprefix(DCGAN)) if name.startswith(DCGAN) else SEED)
    build, steps = OPTIMIZERS[optimizer]
    start = time.perf_counter()
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        made = supported if expected == "right" else planted
        try:
            built, fake, real = made(name, build, steps)
            loss = built.loss(STEPS)
            report: Any
            if check == "step":
                report = unroll.check_step(loss, built.step, fake, real)
            else:
                report = unroll.check_gradients(loss, fake, real)
            verdict, error, words = report.verdict, report.relative_error, report.suspicions
        except Exception as error_:
            verdict, error, words = "refused", float("nan"), (f"{type(error_).__name__}: {error_}",)
    named = expected == "right" or any(re.search(FAULTS[name][2], w) for w in words)
    return {
        "game": name, "optimizer": optimizer, "check": f"check_{check}", "expected": expected,
        "verdict": verdict, "relative_error": f"{error:.1e}", "named": str(named),
        "words": " / ".join(words), "seconds": f"{time.perf_counter() - start:.1f}",
    }  # fmt: skip


def failures(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return what is asked of the rows and does not hold."""
    found = []
    for row in rows:
        who = f"{row['game']}, {row['optimizer']}, {row['check']}: {row['verdict']} {row['words']}"
        if row["expected"] == "wrong":
            if row["verdict"] not in ("wrong", "refused") or row["named"] != "True":
                found.append(who)
        elif row["verdict"] not in ("right", "inconclusive") or (
            row["verdict"] != "right" and (row["optimizer"] == "SGD" or not row["words"])
        ):
            found.append(who)
    for check in CHECKS:
        told = [
            row["verdict"] == "right"
            for row in rows
            if (row["expected"], row["optimizer"]) == ("right", "trained Adam")
            and row["check"] == f"check_{check}"
        ]
        if told and sum(told) < 0.95 * len(told):
            found.append(f"check_{check}, trained Adam: {sum(told)} of {len(told)} are right")
    return found


def key(case: Case) -> tuple[str, str, str]:
    """Return what a row is found by."""
    return case[1], case[2], f"check_{case[3]}"


def recorded() -> dict[tuple[str, str, str], dict[str, str]]:
    """Return the rows on record."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {(r["game"], r["optimizer"], r["check"]): r for r in csv.DictReader(file)}


def record(rows: dict[tuple[str, str, str], dict[str, str]]) -> None:
    """Write the rows that are still asked for, in their order."""
    found = [rows[key(case)] for case in cases() if key(case) in rows]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write docs/results/self_check.csv")
    parser.add_argument("--only", default="", help="rows with this in their name")
    parser.add_argument("--missing", action="store_true", help="rows that are not on record")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    on_record = recorded()
    chosen = [
        case
        for case in cases()
        if options.only in ", ".join(case) and not (options.missing and key(case) in on_record)
    ]
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    rows = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for case, row in zip(chosen, pool.map(answer, chosen), strict=True):
            rows.append(row | {"torch": torch.__version__, "git_revision": revision})
            told = row["verdict"] == row["expected"] and row["named"] == "True"
            print(*list(row.values())[: 6 if told else None], sep=", ", flush=True)
            if options.record:
                on_record[key(case)] = rows[-1]
                record(on_record)
    wrong = failures(list(on_record.values()) if options.record else rows)
    print(f"{len(rows)} rows; what does not hold: {len(wrong)}", *wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
