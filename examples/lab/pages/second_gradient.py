"""The section on the second term of the unrolled gradient."""

from collections.abc import Callable, Mapping, Sequence

from lab.pages.claims import Comparison, Records, claims, shown, table
from lab.pages.stability import LATE, RULE, figure, late, not_run, stable

GRADIENTS = {
    ("False", "False"): "both",
    ("True", "False"): "first",
    ("True", "True"): "first, averaged",
}
WANTED: dict[tuple[str, int], tuple[object, ...]] = {
    (f"{steps}:1 {gradient} K =", k): (steps, stop, average, k)
    for steps in (1, 5)
    for (stop, average), gradient in GRADIENTS.items()
    for k in (1, 3, 5, 10, 20)
    if (average, k) != ("True", 1)  # the mean of f_1 alone
}
FIGURES = {
    "both": ("full", "both terms"),
    "first": ("first", "the first term alone"),
    "first, averaged": ("averaged", "the first term of the mean of f_1..f_K"),
}


RATE = "0.002"  # the learning rate of `quick`
NAMES = ("generator_steps", "stop_gradient", "average", "unroll_steps")


class Ratio:
    """The runs with one number of generator steps per discriminator step, at one learning rate."""

    def __init__(self, records: Records, generator_steps: str, name: str = "") -> None:
        self.name = name or f"{generator_steps}:1"
        self.records = records.pick(generator_steps=generator_steps)

    def arm(self, gradient: str) -> dict[str, object]:
        """Return the settings of a gradient."""
        (stop, average), _ = next(item for item in GRADIENTS.items() if item[1] == gradient)
        return {"stop_gradient": stop, "average": average}

    def ran(self, gradient: str) -> list[int]:
        """Return the numbers of look-ahead steps that were run."""
        return [int(k) for (k,) in self.records.pick(**self.arm(gradient)).settings("unroll_steps")]

    def needed(self, gradient: str, ks: Sequence[int]) -> list[float]:
        """Return the look-ahead steps from which on each seed is stable; twice the most if none."""
        runs = self.records.pick(**self.arm(gradient)).rows
        found = []
        for seed in dict.fromkeys(row["seed"] for row in runs):
            least = 2 * max(ks)
            own = {int(row["unroll_steps"]): stable(row) for row in runs if row["seed"] == seed}
            for k in sorted(ks, reverse=True):
                if not own[k]:
                    break
                least = k
            found.append(float(least))
        return found

    def faster(self, slow: str, fast: str, *, says: str = "larger") -> list[Comparison]:
        """Compare the steps that two gradients need, of those that were run with both."""
        ks = [k for k in self.ran(slow) if k in self.ran(fast)]
        if not ks:
            return []
        text = f"{self.name}, steps needed, {slow} against {fast}"
        return [Comparison(text, self.needed(slow, ks), self.needed(fast, ks), says)]

    def stable_at(self, one: tuple[str, int], other: tuple[str, int]) -> list[Comparison]:
        """Compare the shares of stable seeds of two gradients and numbers of steps."""
        sides = [self.arm(gradient) | {"unroll_steps": k} for gradient, k in (one, other)]
        text = f"{self.name}, stable seeds, {one[0]} K={one[1]} against {other[0]} K={other[1]}"
        return self.records.compare(text, stable, sides[0], sides[1])

    def second_term_helps(self, k: int, *, says: str = "larger") -> list[Comparison]:
        """Compare the modes that both terms and the first alone capture at one K."""
        return self.records.compare(
            f"{self.name}, late modes, K={k}, both against first",
            "late_modes",
            self.arm("both") | {"unroll_steps": k},
            self.arm("first") | {"unroll_steps": k},
            says=says,
        )


def mog_second_gradient(records: Records) -> str:
    """Return the section on the second term of the gradient."""
    everything = records.pick(preset="quick")
    quick = everything.pick(learning_rate=RATE)
    longest = max(quick.values("player_updates"))
    ratios = {steps: Ratio(quick, steps) for (steps,) in quick.settings("generator_steps")}
    first = quick.rows[0]
    one, five = ratios["1"], ratios["5"]
    lower = {
        rate: everything.pick(learning_rate=rate)
        for (rate,) in everything.settings("learning_rate")
        if rate != RATE
    }
    fives = [five, *(Ratio(own, "5", f"5:1 at {rate}") for rate, own in lower.items())]
    ks = [int(k) for (k,) in quick.settings("unroll_steps")]
    drawn = {}
    for steps, stop, average in quick.settings(*NAMES[:3]):
        name, text = FIGURES[GRADIENTS[stop, average]]
        drawn[f"{steps}_{name}"] = f"{steps} G steps per D step, {text}, seed 0."
    for steps in ratios:
        drawn[f"{steps}_full_curves"] = f"{steps} G steps per D step, both terms, all seeds."
    figures = "\n\n".join(
        figure(f"mog_second_gradient_{name}", text) for name, text in drawn.items()
    )
    return f"""## The second term of the gradient

`mog_second_gradient.py`, Appendix B.2: G follows both terms of Eq. 12, the first alone
(`stop_gradient=True`), or the first of the mean of f_1..f_K (`average=True` too; at K=1 the same),
with one and with five G steps per D step. Each of the five looks ahead from the same D.
"second / first" is the norm of the second term over that of the first, in all parameters of G, on
one held-out batch, whichever G follows.

{RULE}

Samples "outside" are those that the figures do not show. The steps needed are the least K, of those
that were run, from which on a seed is stable, at every larger one too. Where two are compared, it
is at the K that were run with both, and a seed that is not stable counts as twice the largest.

Scaled down: `quick` has {longest:,.0f} updates of G and D for 50,000, at twenty times the paper's
learning rates, and batches of {first["batch_size"]}. Stable is not converged here: many samples are
between the modes, as the share of high quality and the figures show. And at a higher learning rate
each look-ahead step goes further: the steps needed need not be those at the paper's
1e-4.{not_run(quick, NAMES, WANTED)} Again:
`python examples/mog_second_gradient.py --record --figures`.

{_tables(quick)}

{_at_lower_rates(lower)}{claims((
    ("App. B.2", "1:1, both need 3 steps to become stable", [
        *one.stable_at(("both", 3), ("both", 1)), *one.stable_at(("first", 3), ("first", 1)),
    ]),
    ("App. B.2", "1:1, no difference without the second term", [
        *one.faster("first", "both", says="not larger"),
        *_each(lambda k: one.second_term_helps(k, says="not larger"), ks),
    ]),
    ("App. B.2", "5:1, the second term helps: both need half as many steps as the first", [
        *(found for ratio in fives for found in (
            *ratio.faster("first", "both"), *ratio.stable_at(("both", 5), ("first", 5)),
            *_each(ratio.second_term_helps, ks),
        )),
    ]),
    ("Fig. App.4", "5:1, both terms need 5 steps to converge", [
        found for ratio in fives for found in ratio.stable_at(("both", 5), ("both", 3))
    ]),
    ("Fig. App.4", "5:1, the first term alone needs 10", [
        found for ratio in fives for found in ratio.stable_at(("first", 10), ("first", 5))
    ]),
    ("App. B.2", "the second term is larger where D is kept out of equilibrium", _each(
        lambda k: quick.compare(
            f"late second / first, both terms, K={k}, 5:1 against 1:1",
            "late_second_term",
            *(one.arm("both") | {"unroll_steps": k, "generator_steps": n} for n in (5, 1)),
        ), ks
    )),
    ("ours", "at the same K, the mean of f_1..f_K is less stable than f_K (first terms)", [
        comparison
        for ratio in (one, five)
        for k in ks[1:]
        for comparison in ratio.stable_at(("first", k), ("first, averaged", k))
    ]),
))}

The paper names the averaged configuration and shows no result of it.

{figures}
"""  # fmt: skip


def _tables(records: Records) -> str:
    """Return the table of the runs at a learning rate, and that of the steps needed."""
    lines = []
    for setting in records.settings(*NAMES):
        steps, stop, average, k = setting
        own = records.pick(**dict(zip(NAMES, setting, strict=True)))
        second = shown(own.values("late_second_term"))
        seconds = f"{own.values('seconds')[0]:.0f}"
        lines.append((f"{steps}:1", GRADIENTS[stop, average], k, *late(own), second, seconds))
    needs = []
    for (steps,) in records.settings("generator_steps"):
        ratio = Ratio(records, steps)
        for gradient in GRADIENTS.values():
            if ran := ratio.ran(gradient):
                needed = ratio.needed(gradient, ran)
                cells = [f"{n:.0f}" if n <= ran[-1] else f"> {ran[-1]}" for n in needed]
                needs.append((f"{steps}:1", gradient, _listed(ran), ", ".join(cells)))
    head = ("G:D steps", "terms", "K", *LATE, "late second / first", "seconds of all seeds")
    return f"""{table(head, lines)}

Look-ahead steps needed, seed by seed:

{table(("G:D steps", "terms", "K that were run", "steps needed"), needs)}"""


def _at_lower_rates(lower: Mapping[str, Records]) -> str:
    """Return the tables of the learning rates below that of `quick`."""
    return "".join(
        f"""At a learning rate of {rate}, with {max(own.values("player_updates")):,.0f} updates
(`--learning-rate {rate}`):

{_tables(own)}

"""
        for rate, own in lower.items()
    )


def _each(compare: Callable[[int], list[Comparison]], ks: Sequence[int]) -> list[Comparison]:
    return [comparison for k in ks for comparison in compare(k)]


def _listed(ks: Sequence[int]) -> str:
    return ", ".join(map(str, ks))
