"""The section on past discriminators."""

from lab.pages.claims import Records, Setting, claims, table
from lab.pages.stability import LATE, RULE, figure, late, not_run

DELAYS = (10, 100, 500)
WANTED: dict[tuple[str, int], tuple[object, ...]] = {
    ("N =", 50): (0, 50, 1, True),
    **{("delay", delay): (0, 5, delay, True) for delay in DELAYS},
    **{("delay, the newest as sampled,", delay): (0, 5, delay, False) for delay in DELAYS},
}


def mog_history(records: Records) -> str:
    """Return the section on past discriminators."""
    quick = records.pick(preset="quick").most("pairs")
    first = quick.rows[0]
    pairs, seeds = int(first["pairs"]), len({row["seed"] for row in quick.rows})
    names = ("unroll_steps", "members", "delay", "live")
    lines = []
    for setting in quick.settings(*names):
        k, members, delay, live = setting
        own = quick.pick(**dict(zip(names, setting, strict=True)))
        newest = "D itself" if live == "True" else "as sampled"
        seconds = f"{own.values('seconds')[0]:.0f}"
        lines.append((k, members, delay, newest, *late(own), seconds))
    head = ("K", "N", "delay", "newest member", *LATE, "seconds of all seeds")

    def arm(members: int, delay: int = 1, *, k: int = 0, live: bool = True) -> Setting:
        return {"unroll_steps": k, "members": members, "delay": delay, "live": live}

    plain, ahead = arm(1), arm(1, k=10)
    sizes = [int(n) for (n,) in quick.pick(delay=1, unroll_steps=0).settings("members") if n != "1"]
    delays = [(int(d), newest == "True") for d, newest in quick.settings("delay", "live")]
    delays = [(delay, live) for delay, live in delays if delay > 1]

    def named(delay: int, live: bool) -> str:
        return f"delay {delay}" + ", newest as sampled" * (not live)

    steadier = [
        comparison
        for n in sizes
        for comparison in quick.compare(
            f"late KL, N=1 against {n}", "late_reverse_kl_all", plain, arm(n), says="not larger"
        )
    ]
    worse = [
        comparison
        for delay, live in delays
        for column, text in (
            ("late_percent_outside", "late % outside"),
            ("late_reverse_kl_all", "late KL"),
        )
        for comparison in quick.compare(
            f"{text}, {named(delay, live)} against 1", column, arm(5, delay, live=live), arm(5)
        )
    ]
    looking_back = [(f"N={n}", arm(n)) for n in sizes]
    looking_back += [(named(delay, live), arm(5, delay, live=live)) for delay, live in delays]
    instead = [
        comparison
        for text, back in looking_back
        for comparison in quick.compare(
            f"late modes, K=10 against {text}", "late_modes", ahead, back
        )
    ]
    drawn = {
        "ensembles": "Ensembles of the last N, and looking K steps ahead, seed 0.",
        "delays": "Five members, the newest D itself, with delays, seed 0.",
        "sampled": "Five members, all as sampled, with delays, seed 0; empty: none in the window.",
        "ensembles_curves": "Metrics: thin lines are seeds, thick ones their means.",
    }
    if all(live for _, live in delays):
        del drawn["sampled"]
    figures = "\n\n".join(figure(f"mog_history_{name}", text) for name, text in drawn.items())
    return f"""## Looking back: past discriminators

`mog_history.py`, Appendix B.1: G's loss is the mean of f over an ensemble of N discriminators: the
last N (Fig. App.1), or 5 of them, one in every `delay` updates (Fig. App.2). Only D itself is
trained. The paper does not say how the members are combined, nor whether D itself is one between
the moments at which it is sampled: here it is ("D itself"), or is not ("as sampled"). Until there
are N, the ensemble is of those that there are. N=1 is the standard GAN, and K=10 looks ten steps
ahead and not back.

{RULE}

Samples "outside" are those that the figures do not show: more than 2.8 from the middle in a
coordinate.

Scaled down: `quick` of `mog.py`, with learning rates of 1e-3 for 1e-4, {pairs:,} pairs for 25,000
and batches of {first["batch_size"]}. The values of N and of the delay are our choice; the longest
delay lasts {_longest(quick)} of the training. There are {seeds} seeds a setting: "no difference" is
weak evidence.{not_run(quick, names, WANTED)} Again:
`python examples/mog_history.py --record --figures`.

{table(head, lines)}

{claims((
    ("Fig. App.1", "an ensemble of the last N does not visibly increase stability", steadier),
    ("Fig. App.2", "longer delays make it less stable, and the samples leave the window", worse),
    ("ours", "looking ten steps ahead does what no looking back does", instead),
))}

{figures}
"""  # fmt: skip


def _longest(records: Records) -> str:
    delay = max(records.values("delay"))
    return f"{100 * delay / records.values('pairs')[0]:.0f} %"
