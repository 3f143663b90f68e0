"""The section on what one would pick instead of unrolling."""

from collections.abc import Sequence
from typing import NamedTuple

from lab.claims import Comparison, Records, claims, moments, shown, table

PILOT = 100  # seeds from here on were for the choice of the learning rate alone
PLAIN = ("GAN", "GAN-NS")


class Metric(NamedTuple):
    """A column of the record, and which end of it is good."""

    column: str
    title: str
    digits: int
    larger_is_better: bool = True


METRICS = (
    Metric("modes", "modes", 2),
    Metric("percent_high_quality", "% high quality", 1),
    Metric("reverse_kl_all", "reverse KL, all", 3, larger_is_better=False),
)


def better(one: Sequence[float], other: Sequence[float], metric: Metric) -> Comparison:
    """Return the comparison whose claim is that the first is better."""
    return Comparison("", one, other) if metric.larger_is_better else Comparison("", other, one)


def standings(records: Records) -> str:
    """Return the table of one mixture, with the rank of every arm in every metric."""
    arms = records.settings("method", "unroll_steps")
    arms.sort(key=lambda arm: [r["method"] for r in records.rows].index(arm[0]))
    rows = {(m, k): records.pick(method=m, unroll_steps=k) for m, k in arms}
    most = max(records.values("modes"))
    lines = []
    for (method, k), seeds in rows.items():
        cells = []
        for metric in METRICS:
            own = seeds.values(metric.column)
            ahead = sum(
                better(other.values(metric.column), own, metric).finding == "for"
                for other in rows.values()
            )
            cells.append(f"{shown(own, metric.digits)} ({1 + ahead})")
        full = sum(value == most for value in seeds.values("modes"))
        seconds = f"{seeds.values('cpu_seconds')[0]:.0f}"
        lines.append((method, k, f"{full} / {len(seeds.rows)}", *cells, seconds))
    titles = [f"{metric.title} (rank)" for metric in METRICS]
    head = ("method", "K", f"seeds with {most:.0f} modes", *titles, "CPU seconds of all seeds")
    return table(head, lines)


def pilot_text(pilot: Records, chosen: str) -> str:
    """Return how the learning rate was chosen."""
    rates = {rate: pilot.pick(learning_rate=rate) for (rate,) in pilot.settings("learning_rate")}
    if not rates:
        return f"The learning rate is {chosen} for all."
    covered = {rate: moments(own.values("modes"))[0] for rate, own in rates.items()}
    listed = ", ".join(f"{value:.1f} at {rate}" for rate, value in covered.items())
    best = max(covered, key=lambda rate: covered[rate])
    seeds = len({row["seed"] for row in pilot.rows})
    verb = "is the one" if best == chosen else f"is not the best one, {best},"
    return (
        f"The learning rate {chosen}, the same for all methods and both players, {verb} at which "
        f"the methods without looking ahead cover most modes of the grid on average, of those that "
        f"were tried on {seeds} other seeds: {listed}."
    )


def mog_rivals(records: Records) -> str:
    """Return the section on the rivals."""
    pilot = Records([row for row in records.rows if int(row["seed"]) >= PILOT])
    final = Records([row for row in records.rows if int(row["seed"]) < PILOT])
    first = final.rows[0]
    pairs = f"{int(first['pairs']):,}"
    methods = list(dict.fromkeys(row["method"] for row in final.rows))
    rivals = [method for method in methods if method not in PLAIN]
    mixtures = [data for data in ("ring", "grid") if final.pick(data=data).rows]

    def arm(data: str, method: str, k: int) -> dict[str, object]:
        return {"data": data, "method": method, "unroll_steps": k}

    def against(ones: Sequence[str], other: str, k: int = 0, other_k: int = 0) -> list[Comparison]:
        return [
            comparison
            for one in ones
            for data in mixtures
            for comparison in final.compare(
                f"modes of the {data}, {one} K={k} against {other} K={other_k}",
                "modes",
                arm(data, one, k),
                arm(data, other, other_k),
            )
        ]

    def family(start: str) -> list[str]:
        return [method for method in methods if method.startswith(start)]

    def ahead(ones: Sequence[str]) -> list[Comparison]:
        return [comparison for one in ones for comparison in against([one], one, 5, 0)]

    tables = "\n\n".join(f"The {data}:\n\n{standings(final.pick(data=data))}" for data in mixtures)
    figures = "\n\n".join(
        f"![Generated samples of every method](../figures/mog_rivals_{data}.png)\n\n"
        f"*The {data}, seed 0, at the end: every method without looking ahead and with.*"
        for data in mixtures
    )
    return f"""## What one would pick instead

`mog_rivals.py`: methods against mode collapse on the ring of the paper and the 5x5 grid of VEEGAN
and PacGAN, with the same networks, learning rate, batch size and number of generator updates
({pairs}), each alone (K=0) and with its own generator loss five steps of its own D ahead.
PacGAN2 packs two samples and is non-saturating, as GAN-NS is; "grad-norm" is the minimax game, GAN,
with the term of Nagarajan and Kolter, of weight 0.5, that stands for one look-ahead step to first
order; WGAN-GP has five critic steps and the penalty's weight 10 of its paper or 0.1 of its authors'
code for toys; RpGAN+R1+R2 has gamma 1 or 0.1, the ends of R3GAN's schedule. Sources and the other
settings are in the file.

A rank is one more than the number of arms, of those in the table, that are better by more than two
standard errors of the difference, so that equals share it. High quality is easily had by a
generator that sits on one mode: read it beside the modes. CPU seconds are those of the process, so
that they can be compared although the machine did other work.

Scaled down: `quick` has {first["width"]} units a layer, batches of {first["batch_size"]}, a
learning rate of {first["learning_rate"]} and {pairs} updates of G, where the unrolled paper has
128, 512, 1e-4 and 25,000. {pilot_text(pilot, first["learning_rate"])} Methods were not tuned
otherwise, and none with K=5. Again: `python examples/mog_rivals.py --record --figures`.

{tables}

{claims((
    ("PacGAN", "packing covers more modes than the same game without it",
     against(family("PacGAN"), "GAN-NS")),
    ("Nagarajan & Kolter", "the gradient-norm term covers more modes than the same game without it",
     against(family("grad"), "GAN")),
    ("WGAN-GP", "it covers more modes than the non-saturating GAN",
     against(family("WGAN"), "GAN-NS")),
    ("R3GAN", "pairing with both penalties covers more modes than the non-saturating GAN",
     against(family("RpGAN"), "GAN-NS")),
    ("ours", "looking ahead covers more modes with the plain games", ahead(family("GAN"))),
    ("ours", "looking ahead covers more modes with the rivals too", ahead(rivals)),
    ("ours", "the minimax GAN with K=5 covers more modes than every rival alone",
     [comparison for rival in rivals for comparison in against(["GAN"], rival, 5, 0)]),
    ("ours", "every rival alone covers more modes than the minimax GAN with K=5",
     [comparison for rival in rivals for comparison in against([rival], "GAN", 0, 5)]),
))}

{figures}
"""  # fmt: skip
