"""The tables of the benchmarks and of the correctness matrix, from their records."""

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from lab.columns import DOCS

Row = Mapping[str, str]
OTHERS = {
    "registered": "registered rules",
    "several": "a list of optimizers",
    "transform_gradients": "`transform_gradients=`",
}


def records(name: str) -> Sequence[Row]:
    """Return the rows of a record: none where it was never made."""
    path = DOCS / "results" / f"{name}.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def worst(rows: Iterable[Row], column: str = "relative_error") -> str:
    """Return the largest number of a column, with one digit."""
    values = [float(row[column]) for row in rows if row[column]]
    return (f"{max(values):.0e}" if max(values) else "0") if values else ""


def correctness(rows: Sequence[Row]) -> str:
    """Return the matrix of discriminators and classes of optimizers, and its worst cell."""

    def family(row: Row) -> str:
        package, _, name = row["class"].rpartition(".")
        return name if package == "torch.optim" else package

    others = ("torchopt", *OTHERS)
    families = sorted({*map(family, rows)}, key=lambda name: (name in others, name.lower()))
    exact, refused, too_old = [], [], dict[str, list[str]]()
    for discriminator in dict.fromkeys(row["discriminator"] for row in rows):
        own = [row for row in rows if row["discriminator"] == discriminator]
        refusals = sorted({row["refusal"] for row in own if row["refusal"]})
        if all(row["refusal"] for row in own):
            refused.append([discriminator, ", ".join(refusals)])
            continue
        for version in {row["torch"] for row in own}:
            if all(row["refusal"] for row in own if row["torch"] == version):
                too_old.setdefault(version, []).append(discriminator)
        cells = [[row for row in own if family(row) == name] for name in families]
        text = [worst(c) or ", ".join(sorted({r["refusal"] for r in c})) for c in cells]
        exact.append([discriminator, *text])
    measured = [row for row in rows if row["relative_error"]]
    last = max(measured, key=lambda row: float(row["relative_error"]))
    revisions = ", ".join(sorted({row["revision"] for row in rows}))
    versions = ", ".join(dict.fromkeys(row["torch"] for row in rows))
    summary = (
        f"{len(measured)} cells of {len(exact)} discriminators and "
        f"{len({row['optimizer'] for row in rows})} optimizers; the worst is {worst(measured)} "
        f"({last['discriminator']}, {last['optimizer']}). torch {versions}, revision "
        f"{revisions}, seed {rows[0]['seed']}, K = {rows[0]['unroll_steps']}."
    )
    return "\n\n".join(
        [
            summary,
            markdown(["discriminator", *families], exact),
            "Refused, whatever the optimizer:",
            markdown(["discriminator", "exception"], refused),
            *(
                f"Refused on torch {version}, which lacks a derivative: {'; '.join(names)}."
                for version, names in sorted(too_old.items())
            ),
        ]
    )


def optimizers(rows: Sequence[Row]) -> str:
    """Return what trains D, by class: parity with its real steps, and the matrix' worst error."""

    def family(row: Row) -> str:
        package, _, name = row["class"].rpartition(".")
        if package == "torch.optim" or row.get("float32") == row.get("float64") == "":
            return f"`{row['class']}`"
        if package in OTHERS:
            return OTHERS[package]
        if name.startswith("Meta"):
            return "torchopt's `MetaOptimizer`s"
        if name == "FuncOptimizer":
            return "`torchopt.FuncOptimizer`"
        return "torchopt's `Optimizer`s" if name[0].isupper() else "torchopt's transformations"

    def option(row: Row) -> str:
        package, _, name = row["class"].rpartition(".")
        entry = row["optimizer"].removeprefix("torchopt.")
        return entry.removeprefix(name).strip() if package == "torch.optim" else entry

    matrix = records("correctness")
    table, refused = [], []
    for name in dict.fromkeys(map(family, [*rows, *matrix])):
        own = [row for row in rows if family(row) == name]
        if any(row["refusal"] for row in own):
            refused.append(f"{name} ({own[0]['refusal']})")
            continue
        cells = [row for row in matrix if family(row) == name]
        options = [option(row) for row in own or cells]
        checked = ", ".join(dict.fromkeys(o for o in options if o))
        errors = [worst(own, dtype) or "n/a" for dtype in ("float32", "float64")]
        table.append([name, checked, *errors, worst(cells) or "n/a"])
    header = ["optimizer", "checked", "steps, float32", "steps, float64", "gradient, float64"]
    return f"{markdown(header, table)}\n\nRefused by name: {', '.join(refused)}."


def benchmarks(rows: Sequence[Row]) -> str:
    """Return a table of times for each network and allocator, and what memory and a start cost."""
    ks = sorted({row["unroll_steps"] for row in rows}, key=int)
    networks, allocators, peers = (
        list(dict.fromkeys(row[column] for row in rows))
        for column in ("network", "allocator", "peer")
    )

    def grid(network: str, allocator: str, cell: Callable[[Row], str]) -> str:
        found = {
            (row["peer"], row["unroll_steps"]): cell(row)
            if row["status"] == "ok"
            else row["status"]
            for row in rows
            if (row["network"], row["allocator"]) == (network, allocator)
        }
        lines = [[peer, *(found.get((peer, k), "") for k in ks)] for peer in peers]
        known = [line for line in lines if any(line[1:])]
        return markdown(["K", *ks], known) if known else ""

    def above_no_steps(row: Row) -> str:
        same = ("network", "allocator", "peer")
        base = [r for r in rows if r["unroll_steps"] == "0" and all(r[c] == row[c] for c in same)]
        known = base and base[0]["peak_mib"]
        return f"{max(float(row['peak_mib']) - float(known), 0):.0f}" if known else ""

    def time(row: Row) -> str:
        ratio = f" ({float(row['vs_plain']):.2f})" if row["vs_plain"] else ""
        return number(row["median_ms"]) + ratio

    parts = []
    for kind, title, cell in (
        (
            "Time",
            "ms a generator step (in brackets: of K plain steps of D; without: timed alone)",
            time,
        ),
        ("Memory", "peak MiB above K = 0", above_no_steps),
        ("First call", "s", lambda row: f"{float(row['first_ms']) / 1e3:.2f}"),
    ):
        parts.append(f"## {kind}: {title}")
        for network in networks:
            for allocator in allocators[:1] if kind == "First call" else allocators:
                if text := grid(network, allocator, cell):
                    parts += [f"**{network}**, malloc: {allocator}", text]
    versions = {
        name: ", ".join(sorted({row[name] for row in rows if row[name]}))
        for name in ("threads", "torch", "torchopt", "higher", "jax", "optax", "revision")
    }
    loads = [float(load) for load in {row["load_average"] for row in rows} - {""}]
    listed = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    parts.append(f"{listed}; load average {min(loads):.1f} to {max(loads):.1f}.")
    return "\n\n".join(parts)


def compiled(rows: Sequence[Row]) -> str:
    """Return how many pairs compiled steps serve, how exactly, and which run uncompiled."""
    served = [row for row in rows if row["compiled"] == "True"]
    revisions = ", ".join(sorted({row["revision"] for row in rows}))
    summary = (
        f"{len(served)} of {len(rows)} pairs are served by compiled steps; f_K and its gradients "
        f"differ by {worst(served)} at worst from those of uncompiled ones. torch "
        f"{rows[0]['torch']}, revision {revisions}. The others run uncompiled, after a warning:"
    )
    reasons: dict[str, list[str]] = {}
    for row in (row for row in rows if row["compiled"] != "True"):
        reason = whole_words(row["reason"]).partition(" (at ")[0]
        reason = re.sub(r" by [\d.e+-]+ in [\d.e+-]+", "", reason)
        optimizer = "" if row["optimizer"] == "torch Adam" else f" with {row['optimizer']}"
        reasons.setdefault(reason, []).append(row["discriminator"] + optimizer)
    lines = [[f"`{reason}`", "; ".join(found)] for reason, found in reasons.items()]
    return f"{summary}\n\n{markdown(['reason', 'discriminators'], lines)}"


def self_checks(rows: Sequence[Row]) -> str:
    """Return how often the self-checks answer what they should."""
    lines = []
    for check, expected in (("check_gradients", "right"), ("check_step", "right"), ("", "wrong")):
        of_kind = [r for r in rows if r["check"].startswith(check) and r["expected"] == expected]
        what = f"`{check}`, games that are right" if check else "planted faults, either check"
        line = [what]
        for optimizer in ("SGD", "trained Adam", "fresh Adam"):
            cells = [r for r in of_kind if r["optimizer"] == optimizer]
            answers = {expected} if check else {expected, "refused"}
            told = [r for r in cells if r["verdict"] in answers and r["named"] == "True"]
            line.append(f"{len(told)} of {len(cells)}")
        lines.append(line)
    return markdown(["", "SGD", "trained Adam", "fresh Adam"], lines)


def whole_words(text: str, cut: int = 120) -> str:
    """Return a text that the record has cut, up to its last whole word."""
    return text if len(text) < cut else f"{text.rpartition(' ')[0]} ..."


def costs(rows: Sequence[Row], steps: int = 10) -> str:
    """Return what a generator step costs at one K, in times of K training steps of D."""
    peers = ("unroll", "unroll, compile", "unroll, checkpoint")
    cells = [r for r in rows if r["unroll_steps"] == str(steps) and r["allocator"] == "default"]
    lines = []
    for network in ("paper", "wide", "stacked", "dcgan32"):
        found = {r["peer"]: r for r in cells if r["network"] == network and r["status"] == "ok"}
        own_row, jax = found["unroll"], found.get("JAX, optax")
        ratios = [f"{float(own_row['vs_best_torch_peer']):.2f}", own_row["rounds"]]
        ratios.insert(0, f"{float(jax['vs_plain']):.2f}" if jax else "")
        own = [f"{float(found[p]['vs_plain']):.2f}" if p in found else "" for p in peers]
        lines.append([network, f"{number(found['plain']['median_ms'])} ms", *own, *ratios])
    head = ["D", f"{steps} training steps of D", "`unroll`", "`compile=True`", "`checkpoint=True`"]
    return markdown([*head, "JAX", "`unroll` / fastest other in PyTorch", "rounds"], lines)


def number(text: str) -> str:
    """Return three digits of a positive number, without an exponent."""
    return f"{float(text):.{max(0, 2 - math.floor(math.log10(float(text))))}f}"


TABLES: Mapping[str, Callable[[], str]] = {
    "correctness": lambda: correctness(records("correctness")),
    "optimizers": lambda: optimizers(records("optimizers")),
    "compiled": lambda: compiled(records("compiled")),
    "self_checks": lambda: self_checks(records("self_check")),
    "benchmarks": lambda: benchmarks(records("benchmarks")),
    "costs": lambda: costs(records("benchmarks")),
}
