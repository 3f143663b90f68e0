"""The section on what the experiments on MNIST cost."""

from pathlib import Path

from lab.pages.claims import read, table

MOST = 2.0  # percent of a pair with K=0 that its data may take
HEAD = ("experiment", "preset", "K", "batch", "pairs timed", "ms a pair", "images a second")
HEAD += ("data, % of a pair", "pairs of the preset", "projected hours")


def throughput(results: Path) -> str:
    """Return the section, or "" without a record."""
    latest = {
        (row["experiment"], row["preset"], int(row["unroll_steps"])): row
        for row in read(results / "throughput.csv").rows
    }
    if not latest:
        return ""
    lines, slow = [], []
    for (experiment, preset, k), row in sorted(latest.items()):
        pair, data = float(row["seconds_a_pair"]), float(row["data_seconds_a_pair"])
        share, hours = 100 * data / pair, pair * int(row["preset_pairs"]) / 3600
        lines.append((
            *(experiment, preset, str(k), row["batch_size"], row["pairs"], f"{1000 * pair:,.1f}"),
            *(f"{float(row['images_a_second']):,.0f}", f"{share:.2f}"),
            *(f"{int(row['preset_pairs']):,}", f"{hours:,.2f}"),
        ))  # fmt: skip
        if k == 0 and share >= MOST:
            slow.append(f"{experiment} ({preset}): {share:.1f} %")
    verdict = "It is" if not slow else f"It is not for {'; '.join(slow)}; it is elsewhere"
    return f"""## What they cost

`throughput.py`: CPU seconds of a pair of one D and one G update on one core, the median of the
pairs timed, on a machine that did other work beside; images are those of the data that a training
goes through. The real batches of a pair are to take less than {MOST:g} % of it with K=0. {verdict}.
The projected hours are those of all pairs of a preset on this machine, for one seed and without
the evaluations. Again: `python examples/throughput.py --record`.

{table(HEAD, lines)}
"""
