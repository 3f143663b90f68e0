"""The page of the toy experiments: each published claim beside what the records say.

Every number and verdict follows from the records by the rule that the page states.
"""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

from lab.claims import Comparison, Records, Row, claims, shown, table
from lab.rivals_page import mog_rivals

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"

INTRODUCTION = """# The toy experiments

Written by `python examples/tables.py` from the records beside this page. Means over seeds, ±
standard errors. A claim is one or more comparisons of two settings over seeds. A comparison is
*for* its claim where the means differ in the claim's direction by more than two standard errors of
the difference, *the reverse* where they differ as much in the other one, else *no difference*. (A
claim that something does not help has comparisons for it where it does not.) The claim **holds**
where all comparisons are for it, holds **partly** where some are, **does not hold** where none is.

Nothing is corrected for the number of comparisons. All runs are on a CPU, and shorter or smaller
than the originals; each section says how. Seconds are those of a machine that did other work
beside, for all seeds of a setting, which train side by side as one network of independent ones.
"""


def two_clusters(records: Records) -> str:
    """Return the section on the two clusters."""

    def until_covered(row: Row) -> float:
        """Return the epochs until both clusters were covered, or all of them."""
        epoch = float(row["covered_at"])
        return epoch if epoch >= 0 else float(row["epochs"])

    names = ("start", "preset", "epochs", "game", "unroll_steps")
    lines = []
    for setting in records.settings(*names):
        seeds = records.pick(**dict(zip(names, setting, strict=True)))
        count = len(seeds.rows)
        start, preset, epochs, game, k = setting
        lines.append((
            *(start, preset, f"{int(epochs):,}", game, k),
            f"{sum(seeds.values('covers')):.0f} / {count}",
            f"{sum(value >= 0 for value in seeds.values('covered_at'))} / {count}",
            shown([until_covered(row) for row in seeds.rows], 0),
            shown(seeds.values("collapsed")),
            f"{sum(value > 0 for value in seeds.values('on_plateau'))} / {count}",
            shown(seeds.values("d_loss"), 4),
        ))  # fmt: skip
    head = ("start", "preset", "epochs", "game", "K", "cover both at the end", "ever")
    head += ("epochs until then", "evaluations collapsed", "ever at the plateau", "D's loss")

    def shortest(start: str) -> Records:
        """Return the runs from a start that have the length which all games have."""
        runs = records.pick(start=start)
        lengths = runs.settings("epochs")
        return runs.pick(epochs=lengths[0][0]) if lengths else runs

    def arms(game: str) -> tuple[dict[str, object], dict[str, object]]:
        return {"game": game, "unroll_steps": 0}, {"game": game, "unroll_steps": 5}

    random, collapsed = shortest("random"), shortest("collapsed")
    js, rp = arms("JS")[0], arms("Rp")[0]

    def ahead(game: str) -> list[Comparison]:
        """Compare K=5 with K=0, from both starts."""
        off, on = arms(game)
        text = "epochs until covered, K=0 against 5, start"
        return [
            *random.compare("evaluations collapsed, K=0 against 5", "collapsed", off, on),
            *random.compare(f"{text} random", until_covered, off, on),
            *collapsed.compare(f"{text} collapsed", until_covered, off, on),
            *random.compare(
                "seeds that cover at the end, K=5 against 0, start random", "covers", on, off
            ),
            *collapsed.compare(
                "seeds that cover at the end, K=5 against 0, start collapsed", "covers", on, off
            ),
        ]

    basin = [
        Comparison(f"share of the JS seeds {text}", share, [0.0] * len(share))
        for text, column in (
            ("that were collapsed at an evaluation", "collapsed"),
            ("whose D was at the plateau then", "on_plateau"),
        )
        if (share := [float(value > 0) for value in random.pick(**js).values(column)])
    ]
    return f"""## Two clusters

`two_clusters.py`: 100 points in two clusters on a line, 100 fixed noises, networks of 5 and 10
units, SGD. A JS-GAN's D has the loss 0.4774 at best while all fakes sit on one cluster (RpGAN's:
0.3466), and 0.6931 where fakes and data match. A run covers both clusters where each has at least
25 of the 100 fakes within 1 of its middle; it is collapsed where one has at least 90 and the other
none; it is at the plateau where D's loss is then within 0.02 of that value. There is an evaluation
every 10 epochs, of 10 D and 10 G steps each. Epochs until both are covered count as all of them in
runs that never do. JS has the non-saturating loss of the authors' code, minimax the saturating one
of the theorem. The start "collapsed" is in the basin: all fakes on the first cluster, and D trained
alone for 3,000 steps; that all of its runs are at the plateau then confirms both values.

Scaled down: `quick` has five times the authors' learning rates, and the epochs below for 5,000.
Again: `python examples/two_clusters.py --epochs {_length(random)} --record`, and with
`--start collapsed --epochs {_length(collapsed)} --games JS Rp minimax`.

{table(head, lines)}

{claims((
    ("RS-GAN", "the bad basin of the JS-GAN appears in training", basin),
    ("RS-GAN", "RpGAN has no such basin: it collapses less and covers both sooner", [
        *random.compare("evaluations collapsed, JS against Rp", "collapsed", js, rp),
        *random.compare("epochs until covered, JS against Rp", until_covered, js, rp),
        *collapsed.compare("the same from the collapsed start", until_covered, js, rp),
    ]),
    ("ours", "looking ahead removes the JS-GAN's basin", ahead("JS")),
    ("ours", "looking ahead removes the basin of the minimax game", ahead("minimax")),
    ("ours", "looking ahead helps RpGAN too", ahead("Rp")),
))}

Runs of the same game, K and start are the same seeds at two lengths.

The theorem is about the loss at the best D. f_K comes nearer to that loss as K grows, so the
theorem is no reason to expect that looking ahead removes the basin; alternating steps, whose D lags
behind, need not stay in it.

![D's loss over training](../figures/two_clusters_loss.png)

*D's loss, a line a seed.*

![Where the generated samples go](../figures/two_clusters_data.png)

*Each generated sample over training, seed 0.*

![D as a function](../figures/two_clusters_d.png)

*D's logit over training, seed 0.*

![D's loss from the collapsed start](../figures/two_clusters_collapsed_loss.png)

*D's loss from the collapsed start, a line a seed.*
"""  # fmt: skip


def _length(records: Records) -> str:
    return next((epochs for (epochs,) in records.settings("epochs")), "150")


HEADS = {"unroll_steps": "K", "stop_gradient": "terms", "weight_deviation": "weights"}
SHOWN = {
    ("stop_gradient", "False"): "both",
    ("stop_gradient", "True"): "first",
    ("normalise", "False"): "no",
    ("normalise", "True"): "yes",
}


def planar(records: Records, *names: str) -> str:
    """Return the table of an experiment on mixtures in the plane."""
    lines = []
    modes = max(records.values("modes"), default=0)
    for setting in records.settings(*names):
        seeds = records.pick(**dict(zip(names, setting, strict=True)))
        full = sum(value == modes for value in seeds.values("modes"))
        cells = [shown(seeds.values(c)) for c in ("modes", "percent_high_quality")]
        kl = shown(seeds.values("reverse_kl_all"), 3)
        rotations = shown(seeds.values("rotations"), 1)
        seconds = f"{seeds.values('seconds')[0]:.0f}"
        shared = [SHOWN.get(pair, pair[1]) for pair in zip(names, setting, strict=True)]
        lines.append((*shared, f"{full} / {len(seeds.rows)}", *cells, kl, rotations, seconds))
    head = [HEADS.get(name, name.replace("_", " ")) for name in names]
    head += [f"seeds with {modes:.0f} modes", "modes", "% high quality", "reverse KL, all"]
    return table([*head, "rotations", "seconds of all seeds"], lines)


def five_gaussians(records: Records) -> str:
    """Return the section on the five Gaussians."""
    pairs = records.settings("pairs")[-1][0]
    (width,) = records.settings("width")[0]
    narrow = records.pick(preset="quick", pairs=pairs, width=width)
    quick = narrow.pick(normalise=False)

    def arms(game: str, k: int) -> dict[str, object]:
        return {"game": game, "unroll_steps": k}

    def ahead(game: str) -> list[Comparison]:
        on, off = arms(game, 5), arms(game, 0)
        return [
            *quick.compare("% high quality, K=5 against 0", "percent_high_quality", on, off),
            *quick.compare("reverse KL, K=0 against 5", "reverse_kl_all", off, on),
            *quick.compare("modes, K=5 against 0", "modes", on, off),
        ]

    paired = []
    for normalise, text in ((False, "Rp against JS"), (True, "Rp against JS, both normalised")):
        js, rp = ({**arms(game, 0), "normalise": normalise} for game in ("JS", "Rp"))
        paired += narrow.compare(f"% high quality, {text}", "percent_high_quality", rp, js)
        paired += narrow.compare(f"modes, {text}", "modes", rp, js)
    return f"""## Five Gaussians

`five_gaussians.py`: five Gaussians of deviation 0.045 on the unit circle, the original GAN (JS)
against RpGAN. The authors keep D's last layer at unit norm in RpGAN alone; here it is off in both,
unless `normalise` says that it is on in both.

Scaled down: `quick` has learning rates of 1e-3 for 1e-4, the pairs below for 20,000, and {width}
units a layer for 128. Again: `python examples/five_gaussians.py --iterations {pairs} --record`,
with `--normalise`, and with `--width 128 --unroll-steps 0`.

{planar(records, "preset", "pairs", "width", "normalise", "game", "unroll_steps")}

{claims((
    ("RS-GAN", f"RpGAN does better than JS-GAN with narrow networks (K=0, width {width})", paired),
    ("ours", "looking ahead helps JS-GAN", ahead("JS")),
    ("ours", "looking ahead helps RpGAN", ahead("Rp")),
))}

![Samples over training](../figures/five_gaussians_{width}.png)

*Generated samples of seed 0 over training, width {width}.*

![Samples at the end](../figures/five_gaussians_{width}_seeds.png)

*Those of seeds 0 to 3 at the end.*

![Metrics over training](../figures/five_gaussians_{width}_curves.png)

*Metrics over training: thin lines are seeds, thick ones their means.*
"""  # fmt: skip


def mog_nonuniform(records: Records) -> str:
    """Return the section on the non-uniform mixture."""
    pairs = max(records.settings("pairs"), key=lambda n: len(records.pick(pairs=n[0]).rows))[0]
    quick = records.pick(preset="quick", pairs=pairs)

    def arm(activation: str, deviation: float, k: int, first: bool) -> dict[str, object]:
        setting = {"activation": activation, "weight_deviation": deviation}
        return setting | {"unroll_steps": k, "stop_gradient": first}

    def better(
        activation: str, deviation: float, first: bool, *, denied: bool = False
    ) -> list[Comparison]:
        text = f"KL, {activation} {deviation}, K=0 against 10"
        off, on = arm(activation, deviation, 0, False), arm(activation, deviation, 10, first)
        return quick.compare(text, "reverse_kl_all", off, on, denied=denied)

    def missing(activation: str, deviation: float) -> list[Comparison]:
        full, first = (arm(activation, deviation, 10, stop) for stop in (False, True))
        text = f"{activation} {deviation}"
        return [
            *quick.compare(f"KL, {text}, first against full", "reverse_kl_all", first, full),
            *quick.compare(
                f"% high quality, {text}, full against first", "percent_high_quality", full, first
            ),
            *quick.compare(f"rotations, {text}, first against full", "rotations", first, full),
        ]

    def gap(activation: str) -> list[float]:
        """Return what looking ahead takes off the KL, seed by seed."""
        off, on = (
            {row["seed"]: float(row["reverse_kl_all"]) for row in quick.pick(**s).rows}
            for s in (arm(activation, 0.06, 0, False), arm(activation, 0.06, 10, True))
        )
        return [off[seed] - on[seed] for seed in off.keys() & on.keys()]

    relu, tanh = gap("relu"), gap("tanh")
    text = "KL at K=0 less that at 10, 0.06, relu against tanh"
    gaps = [Comparison(text, relu, tanh)] if relu and tanh else []
    ran = records.settings("activation", "weight_deviation")
    figures = "\n\n".join(
        f"![Samples over training](../figures/mog_nonuniform_{activation}_{deviation}.png)\n\n"
        f"*{activation}, weights of deviation {deviation}, seed 0.*"
        for activation, deviation in ran
    )
    everything = [(activation, float(deviation)) for activation, deviation in ran]
    return f"""## Eight Gaussians of unequal weights

`mog_nonuniform.py`, after the README of
[andrewliao11/unrolled-gans](https://github.com/andrewliao11/unrolled-gans): the ring of the paper,
whose modes have weights of standard deviation 0, 0.06 or 0.12. Its code detaches the fakes in the
look-ahead: it follows the first term of Eq. 12 only, "first" here (`stop_gradient=True`). Reverse
KL is of all samples against the true weights.

Scaled down: `quick` has three times the README's learning rates, the pairs below for 3,000, 32
units a layer for 128, batches of 64 for 512. Claims are judged at {pairs} pairs. Again:
`python examples/mog_nonuniform.py --iterations {pairs} --activations relu tanh --record`.

{planar(records, "preset", "pairs", "activation", "weight_deviation", "unroll_steps",
        "stop_gradient")}

{claims((
    ("README", "at 0.06 looking ahead helps slightly (first term, as its code)", [
        *better("tanh", 0.06, True), *better("relu", 0.06, True),
    ]),
    ("README", "the gap is larger with relu than with tanh (first term, as its code)", gaps),
    ("ours", "it helps with the whole gradient", [
        comparison for setting in everything for comparison in better(*setting, False)
    ]),
    ("README", "at 0.12 it does not help, its failure case (first term, as its code)", [
        *better("tanh", 0.12, True, denied=True), *better("relu", 0.12, True, denied=True),
    ]),
    ("ours", "the missing second term matters: the whole gradient does better than the first term",
     [comparison for setting in everything for comparison in missing(*setting)]),
))}

{figures}
"""  # fmt: skip


SECTIONS: Mapping[str, Callable[[Records], str]] = {
    "mog_nonuniform": mog_nonuniform,
    "two_clusters": two_clusters,
    "five_gaussians": five_gaussians,
    "mog_rivals": mog_rivals,
}


def page() -> str:
    """Return the page: a section for each experiment that has records."""
    sections = [INTRODUCTION]
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.csv"
        if path.exists():
            with path.open(newline="") as file:
                sections.append(section(Records(list(csv.DictReader(file)))))
    return "\n".join(sections)
