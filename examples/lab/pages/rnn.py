"""The section on Fig. 3: an LSTM against a convolutional discriminator."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lab.pages.claims import Comparison, Count, Records, claims, moments, read, shown, table

K = "unroll_steps"
DIGITS = 10
METRICS = {
    "classes": ("digits covered", 1),
    "class_entropy": ("entropy", 2),
    "spread": ("variance", 3),
    "largest_mode_changes": ("changes", 1),
    "rotations": ("rotations", 1),
}
DIVERSITY = ("classes", "class_entropy", "spread")
AROUND = 10  # changes of the digit: as many as there are
ENOUGH = 1000  # pairs; K=0 draws digits by then
SCALE = ("preset", "batch_size", "learning_rate")  # runs that differ in it are not compared


def rnn_mnist(results: Path) -> str:
    """Return the section, or "" before both arms have a record."""
    every = read(results / "rnn_mnist.csv")
    if not every.rows:
        return ""
    records = _largest(every)
    first = records.rows[0]
    ks = [k for (k,) in records.settings(K)]
    if ks[0] != "0" or len(ks) == 1:
        return ""
    ahead, standard = records.pick(**{K: ks[-1]}), records.pick(**{K: 0})
    pairs = _shared([records.pick(**{K: k}) for k in ks])
    early = int(pairs) < ENOUGH
    postponed = f", of which {pairs} are too few for a verdict" * early
    late, as_long = _nearest(standard, ahead.pick(pairs=pairs))
    lengths = sorted({(int(k), int(pairs)) for k in ks} | {(0, int(late))})
    cells = [(f"{k}", f"{n:,}", records.pick(**{K: k, "pairs": n})) for k, n in lengths]
    time = "about the" if as_long else "part of the"
    equal = [records.pick(**{K: k, "pairs": pairs}) for k in ks]
    drawn = any(moments(own.values("classes"))[0] >= 2 for own in equal)
    unjudged = (
        ""
        if drawn
        else f"""
After {pairs} pairs neither draws digits yet: the classifier calls nearly all samples one digit,
whatever they are, so what the paper says of digits is not judged at that length.
"""
    )
    alone = standard.pick(pairs=late).values("rotations")
    in_time = _both(records, ks[-1], pairs, late, ("spread",), says="not larger")
    # What it reaches in less time, it reaches; what it does not is not known yet.
    unfinished = not (as_long or all(comparison.agrees for comparison in in_time))
    rotates = Count(
        f"seeds of K=0 with {AROUND} rotations or more after {late} pairs",
        [count >= AROUND for count in alone],
        every=True,
    )
    return f"""## Fig. 3: an LSTM against a convolutional discriminator

`rnn_mnist.py`: an LSTM draws a digit column by column, the networks and the optimizer are those of
Appendix C, and the game is non-saturating, as there. The metrics are of {int(first["samples"]):,}
samples of fixed noise, every {first["evaluate_every"]} pairs of updates. "Digits covered" and their
entropy (ln 10 = 2.30 where all are equal) are through a classifier of
{float(first["classifier_accuracy"]):.1f} % test accuracy, which calls every blob some digit.
"Variance" is the samples', summed over pixels, of the data's: near 0 where all samples are alike,
whatever they are called. "Changes" counts how often the digit that most samples are becomes
another, "rotations" the same over the moments at which more than half of the samples are one digit;
both grow with the number of evaluations.

Scaled down: {pairs} pairs of updates for the 75,000 of Appendix C, batches of
{first["batch_size"]}, and learning rates of {float(first["learning_rate"]):g} for 1e-4, the first
that was tried. K=0 is shown, too, where it had {time} CPU time of
K={ks[-1]}. CPU seconds are of training one seed, on a machine that did other work beside. Again:
`python examples/rnn_mnist.py --unroll-steps {" ".join(ks)} --iterations {pairs}
--standard-iterations {late} --seeds {len(ahead.settings("seed"))} --record --figures`; with
`--resume` and more iterations the same runs go on.
{unjudged}
{_runs(cells)}

{claims((
    ("paper", "without unrolling it rotates through single modes", [rotates]),
    ("ours", f"in {time} CPU time, K=0 is as diverse", in_time, unfinished),
))}

At equal pairs{postponed}:

{claims((
    ("paper", "without unrolling it collapses: with it, samples are more diverse",
     _both(records, ks[-1], pairs, pairs, METRICS if drawn else ("spread",))),
    ("paper", "with unrolling it rotates less", records.compare(
        f"rotations, K=0 against {ks[-1]}", "rotations",
        {K: 0, "pairs": pairs}, {K: ks[-1], "pairs": pairs},
    ) if drawn else []),
    ("paper", "with unrolling it covers the whole data distribution",
     _everywhere(ahead.pick(pairs=pairs)) if drawn else []),
), early=early)}

![Samples over training](../figures/rnn_mnist.png)

*Generated samples of seed 0 over training, as in Fig. 3; K=0 goes on to the right.*

![Metrics over training](../figures/rnn_mnist_curves.png)

*Metrics over training: thin lines are seeds (0 to 2), thick ones their means; dots, the digit that
most samples of seed 0 are.*

![Metrics against CPU time](../figures/rnn_mnist_costs.png)

*Metrics against the CPU time of a seed, means and standard errors.*
"""  # fmt: skip


def _largest(records: Records) -> Records:
    """Return the rows of the scale that most were run at; the last of a run recorded twice."""
    scales = [dict(zip(SCALE, s, strict=True)) for s in records.settings(*SCALE)]
    most = max((records.pick(**scale) for scale in scales), key=lambda own: len(own.rows))
    return Records(list({(r[K], r["seed"], int(r["pairs"])): r for r in most.rows}.values()))


def _shared(arms: Sequence[Records]) -> str:
    """Return the length that all arms have most seeds at, the longer of equals."""
    common = set.intersection(*({row["pairs"] for row in arm.rows} for arm in arms))
    return max(common, key=lambda n: (min(len(arm.pick(pairs=n).rows) for arm in arms), int(n)))


def _nearest(standard: Records, ahead: Records) -> tuple[str, bool]:
    """Return the length of runs without looking ahead that took about the time of those with.

    And whether they did: within a quarter of it.
    """
    spent = moments(ahead.values("cpu_seconds"))[0]
    lengths = [pairs for (pairs,) in standard.settings("pairs")]
    most = max(len(standard.pick(pairs=n).rows) for n in lengths)
    times = {
        n: moments(own.values("cpu_seconds"))[0]
        for n in lengths
        if len((own := standard.pick(pairs=n)).rows) == most
    }
    nearest = min(times, key=lambda n: abs(times[n] - spent))
    return nearest, abs(times[nearest] - spent) <= spent / 4


def _runs(cells: Sequence[tuple[str, str, Records]]) -> str:
    lines = []
    for k, pairs, own in cells:
        values = [shown(own.values(name), digits) for name, (_, digits) in METRICS.items()]
        seconds = own.values("cpu_seconds")
        each = 1000 * sum(seconds) / sum(own.values("pairs"))
        line = (k, pairs, str(len(seconds)), *values)
        lines.append((*line, f"{moments(seconds)[0]:,.0f}", f"{each:,.0f}"))
    heads = [head for head, _ in METRICS.values()]
    return table(("K", "pairs", "seeds", *heads, "CPU seconds", "ms a pair"), lines)


def _both(
    records: Records,
    k: str,
    pairs: str,
    standard: str,
    metrics: Iterable[str],
    *,
    says: str = "larger",
) -> list[Comparison]:
    """Compare the diversity with looking ahead and without."""
    return [
        comparison
        for metric in metrics
        if metric in DIVERSITY
        for comparison in records.compare(
            f"{METRICS[metric][0]}, K={k} against 0",
            metric,
            {K: k, "pairs": pairs},
            {K: 0, "pairs": standard},
            says=says,
        )
    ]


def _everywhere(own: Records) -> list[Count]:
    """Count the seeds that cover all digits, and evenly."""
    full = [
        classes == DIGITS and entropy > 2
        for classes, entropy in zip(own.values("classes"), own.values("class_entropy"), strict=True)
    ]
    return [Count("seeds with all digits and an entropy over 2", full, every=True)]
