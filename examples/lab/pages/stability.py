"""What the sections on Appendix B share: which runs are stable, and their columns."""

from collections.abc import Mapping, Sequence

from lab.pages.claims import Records, Row, shown

STABLE = 0.1  # nats; ln(8/7) = 0.134 is the least that a missing mode of eight costs
RULE = f"""A run is stable where the reverse KL of all its samples is below {STABLE} on average over
the last third of the training: a generator that misses one mode of the eight has 0.134 at least.
Other columns named "late" are averages over that third, too."""


def stable(row: Row) -> float:
    """Return 1 for a stable run, else 0."""
    return float(float(row["late_reverse_kl_all"]) < STABLE)


def counted(seeds: Records) -> str:
    """Return how many runs are stable."""
    return f"{sum(map(stable, seeds.rows)):.0f} / {len(seeds.rows)}"


def late(seeds: Records) -> tuple[str, ...]:
    """Return the cells that both tables have."""
    return (
        counted(seeds),
        shown(seeds.values("late_reverse_kl_all"), 3),
        shown(seeds.values("late_modes")),
        shown(seeds.values("late_percent_high_quality"), 1),
        shown(seeds.values("rotations"), 1),
        shown(seeds.values("late_percent_outside"), 1),
    )


LATE = ("stable seeds", "late reverse KL", "late modes", "late % high quality", "rotations")
LATE += ("late % outside",)


def not_run(
    records: Records,
    names: Sequence[str],
    wanted: Mapping[tuple[str, int], tuple[object, ...]],
) -> str:
    """Return a sentence on the wanted settings, by arm and value, that are not in the record."""
    ran = set(records.settings(*names))
    missing: dict[str, list[str]] = {}
    for (arm, value), setting in wanted.items():
        if tuple(map(str, setting)) not in ran:
            missing.setdefault(arm, []).append(str(value))
    listed = "; ".join(f"{arm} {', '.join(values)}" for arm, values in missing.items())
    return f" Not run, for time: {listed}." if listed else ""


def figure(name: str, caption: str) -> str:
    """Return a figure and its caption."""
    return f"![{caption}](../figures/{name}.png)\n\n*{caption}*"
