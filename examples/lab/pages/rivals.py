"""The section on what one would pick instead of unrolling."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from lab.data.mixtures import CEILING
from lab.pages.claims import Comparison, Records, claims, moments, shown, table

PILOT = 100  # seeds from here on were for the choice of the learning rate alone
PLAIN = ("GAN", "GAN-NS")
SHARP = "percent_high_quality"
MODES = {"ring": 8, "grid": 25}


class Metric(NamedTuple):
    """A column of the record, and which end of it is good."""

    column: str
    title: str
    digits: int
    larger_is_better: bool = True


METRICS = (
    Metric("modes", "modes", 2),
    Metric(SHARP, "% high quality", 1),
    Metric("reverse_kl_all", "reverse KL, all", 3, larger_is_better=False),
)


def better(one: Sequence[float], other: Sequence[float], metric: Metric) -> Comparison:
    """Return the comparison whose claim is that the first is better."""
    return Comparison("", one, other) if metric.larger_is_better else Comparison("", other, one)


def standings(records: Records, modes: int) -> str:
    """Return the table of a mixture of so many modes, with ranks of every arm in every metric."""
    arms = records.settings("method", "unroll_steps")
    arms.sort(key=lambda arm: [r["method"] for r in records.rows].index(arm[0]))
    rows = {(m, k): records.pick(method=m, unroll_steps=k) for m, k in arms}
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
        full = sum(value == modes for value in seeds.values("modes"))
        seconds = f"{seeds.values('cpu_seconds')[0]:.0f}"
        updates = f"{int(seeds.rows[0]['pairs']):,}"
        lines.append((method, k, updates, f"{full} / {len(seeds.rows)}", *cells, seconds))
    titles = [f"{metric.title} (rank)" for metric in METRICS]
    head = ("method", "K", "updates of G", f"seeds with {modes} modes", *titles)
    return table((*head, "CPU seconds of all seeds"), lines)


def same_seconds(records: Records, unrolled: Records) -> Records:
    """Return unrolled runs of one length, and every method alone for about as many seconds.

    The length is the one that the methods alone come nearest to, of those that were run.
    """
    alone = records.pick(unroll_steps=0)

    def apart(own: Records, other: Records) -> float:
        return abs(own.values("cpu_seconds")[0] - other.values("cpu_seconds")[0])

    def beside(goal: Records) -> list[Records]:
        methods = (alone.pick(method=method) for (method,) in alone.settings("method"))
        return [min(_lengths(own), key=lambda r: apart(r, goal)) for own in methods]

    def farthest(goal: Records) -> float:
        return max(apart(own, goal) for own in beside(goal))

    goal = min(_lengths(unrolled), key=farthest)
    return Records([row for own in (goal, *beside(goal)) for row in own.rows])


def _lengths(records: Records) -> list[Records]:
    return [records.pick(pairs=pairs) for (pairs,) in records.settings("pairs")]


def tried(pilot: Records) -> str:
    """Return what was tried before the learning rate and the weights of penalties were chosen."""
    rates = [rate for (rate,) in pilot.settings("learning_rate")]
    if not rates:
        return "Nothing was tuned."

    def covered(**setting: object) -> str:
        return f"{moments(pilot.pick(**setting).values('modes'))[0]:.1f}"

    full = max(rates, key=lambda rate: len(pilot.pick(learning_rate=rate).rows))
    each = {rate: {r["method"] for r in pilot.pick(learning_rate=rate).rows} for rate in rates}
    common = Records([r for r in pilot.rows if all(r["method"] in own for own in each.values())])
    by_rate = ", ".join(
        f"{moments(common.pick(learning_rate=rate).values('modes'))[0]:.1f} at {rate}"
        for rate in rates
    )
    shared = ", ".join(sorted({row["method"] for row in common.rows}))
    weighted = sorted(method for method in each[full] if method[-1].isdigit() and " " in method)
    by_weight = ", ".join(
        f"{covered(method=method, learning_rate=full)} {method}" for method in weighted
    )
    seeds = len({row["seed"] for row in pilot.rows})
    pairs = int(pilot.rows[0]["pairs"])
    return (
        f"The learning rate, one for all, and the weights of penalties were chosen on {seeds} "
        f"other seeds of the grid, without looking ahead, by the modes covered after {pairs:,} "
        f"updates: {by_rate} ({shared}); at {full}, {by_weight}. Nothing else was "
        "tuned, and nothing with K=5."
    )


def scaled(final: Records, pilot: Records) -> str:
    """Return what is smaller than in the papers, and how to run it again."""
    first = final.rows[0]
    methods = dict.fromkeys(row["method"] for row in final.rows)
    named = " ".join(f'"{method}"' if " " in method else method for method in methods)
    sharp = {
        arm: moments(final.pick(method=arm[0], unroll_steps=arm[1]).values(SHARP))[0]
        for arm in final.settings("method", "unroll_steps")
    }
    sharpest, k = max(sharp, key=lambda arm: sharp[arm])
    text = (
        f"Scaled down: `quick` has {first['width']} units a layer, batches of "
        f"{first['batch_size']}, a learning rate of {first['learning_rate']} and "
        f"{int(first['pairs']):,} updates of G, where the unrolled paper has 128, 512, 1e-4 and "
        f"25,000. At that length the sharpest arm ({sharpest}, K={k}) has "
        f"{sharp[sharpest, k]:.1f} % high quality of the {CEILING:.1f} of perfect samples, and a "
        f"diffuse cloud that touches every mode counts as covering them. {tried(pilot)} Again: "
        f"`python examples/mog_rivals.py --methods {named} --iterations {first['pairs']} --record "
        "--figures`."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def mog_rivals(records: Records) -> str:
    """Return the section on the rivals."""
    pilot = Records([row for row in records.rows if int(row["seed"]) >= PILOT])
    every = Records([row for row in records.rows if int(row["seed"]) < PILOT])
    final = every.most("pairs")
    first = final.rows[0]
    pairs = f"{int(first['pairs']):,}"
    methods = list(dict.fromkeys(row["method"] for row in final.rows))
    rivals = [method for method in methods if method not in PLAIN]
    mixtures = [data for data in MODES if final.pick(data=data).rows]

    def arm(data: str, method: str, k: int) -> dict[str, object]:
        return {"data": data, "method": method, "unroll_steps": k}

    def against(
        ones: Sequence[str], other: str, k: int = 0, other_k: int = 0, runs: Records = final
    ) -> list[Comparison]:
        found = []
        for one in ones:
            for data in mixtures:
                better, worse = arm(data, one, k), arm(data, other, other_k)
                text = f"the {data}, {one} K={k} against {other} K={other_k}"
                found += runs.compare(f"modes of {text}", "modes", better, worse)
                text = f"KL of the {data}, {other} K={other_k} against {one} K={k}"
                found += runs.compare(text, "reverse_kl_all", worse, better)
        return found

    def family(start: str) -> list[str]:
        return [method for method in methods if method.startswith(start)]

    def ahead(ones: Sequence[str]) -> list[Comparison]:
        return [comparison for one in ones for comparison in against([one], one, 5, 0)]

    equal = {
        data: same_seconds(every.pick(data=data), every.pick(**arm(data, "GAN", 5)))
        for data in mixtures
        if len(every.pick(data=data, unroll_steps=0).settings("pairs")) > 1
    }
    fair = Records([row for runs in equal.values() for row in runs.rows])
    titled = [(f"The {data}:", data, final.pick(data=data)) for data in mixtures]
    titled += [
        (f"The {data}, GAN with K=5 and every method alone for about as many seconds:", data, runs)
        for data, runs in equal.items()
    ]
    tables = "\n\n".join(f"{title}\n\n{standings(r, MODES[d])}" for title, d, r in titled)
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
standard errors of the difference, so that equals share it. Modes are covered better where more of
them have a high-quality sample, and where the reverse KL of all samples is lower. Sharp samples
come easily to a generator that sits on one mode: read them beside the modes. CPU seconds are of
the process, so that they can be compared although the machine did other work.

{scaled(final, pilot)}

{tables}

{claims((
    ("PacGAN", "packing covers the modes better than the same game without it",
     against(family("PacGAN"), "GAN-NS")),
    ("Nagarajan & Kolter",
     "the gradient-norm term covers the modes better than the same game without it",
     against(family("grad"), "GAN")),
    ("WGAN-GP", "it covers the modes better than the non-saturating GAN",
     against(family("WGAN"), "GAN-NS")),
    ("R3GAN", "pairing with both penalties covers the modes better than the non-saturating GAN",
     against(family("RpGAN"), "GAN-NS")),
    ("ours", "looking ahead covers the modes better with the plain games", ahead(family("GAN"))),
    ("ours", "looking ahead covers the modes better with the rivals too", ahead(rivals)),
    ("ours", "the minimax GAN with K=5 covers the modes better than every rival alone",
     [comparison for rival in rivals for comparison in against(["GAN"], rival, 5, 0)]),
    ("ours", "every rival alone covers the modes better than the minimax GAN with K=5",
     [comparison for rival in rivals for comparison in against([rival], "GAN", 0, 5)]),
    ("ours", "in as many seconds, the minimax GAN with K=5 covers the modes better than all others",
     [comparison for other in methods for comparison in against(["GAN"], other, 5, 0, fair)]),
))}

![Modes covered against seconds](../figures/mog_rivals_costs.png)

*Modes covered against what they cost, means and standard errors: hollow without looking ahead,
filled with.*

{figures}
"""  # fmt: skip
