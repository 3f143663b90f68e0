"""The section on Fig. 2 and on the mixtures of VEEGAN and PacGAN."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from lab.pages.claims import Comparison, Count, Records, claims, moments, read, shown, table
from lab.records import RESULTS

PUBLISHED = RESULTS / "published.csv"
ALONE = RESULTS / "mog.csv"  # of mog.py, a run at a time
K = "unroll_steps"
SHARE = "modes_quarter_share"
MODES, SHARP, EVEN, ROTATIONS = "modes", "percent_high_quality", "reverse_kl_all", "rotations"
METRICS = {
    MODES: ("modes", 2),
    SHARE: ("modes, a quarter share", 2),
    SHARP: ("% high quality", 2),
    "reverse_kl_high_quality": ("reverse KL, HQ", 3),
    EVEN: ("reverse KL, all", 3),
    ROTATIONS: ("rotations", 1),
}
HEADS = {
    "batch_size": "batch",
    K: "K",
    "discriminator_layers": "hidden layers of D",
    "generator_lr": "rate of G",
    "discriminator_lr": "rate of D",
    "half_life": "halved every",
    "resample": "minibatches",
    "discriminator_steps": "real D steps",
}
SETTING = ("preset", "pairs", "batch_size", K)
Arm = tuple[str, Mapping[str, object]]  # its name and its settings


def runs(records: Records, *names: str) -> str:
    """Return a table of settings: metrics over seeds."""
    most = 25 if records.rows[0].get("mixture") == "grid" else 8
    lines = []
    for setting in records.settings(*names):
        seeds = records.pick(**dict(zip(names, setting, strict=True)))
        full = sum(value == most for value in seeds.values(MODES))
        cells = [_shown(seeds.values(name), digits) for name, (_, digits) in METRICS.items()]
        texts = [{"True": "fresh", "False": "fixed"}.get(value, value) for value in setting]
        lines.append((*texts, f"{full} / {len(seeds.rows)}", *cells))
    head = [HEADS.get(name, name) for name in names]
    titles = [title for title, _ in METRICS.values()]
    return table([*head, f"seeds with {most} modes", *titles], lines)


def _shown(values: Sequence[float], digits: int) -> str:
    return "n/a" if any(map(math.isnan, values)) else shown(values, digits)


def better(
    records: Records, metric: str, one: Arm, other: Arm, *, says: str = "larger"
) -> list[Comparison]:
    """Return the comparison whose claim is that the first arm does better than the other."""
    if metric not in (MODES, SHARE, SHARP):  # the less the better
        one, other = other, one
    text = f"{METRICS[metric][0]}, {one[0]} against {other[0]}"
    return records.compare(text, metric, one[1], other[1], says=says)


def published(mixture: str) -> str:
    """Return the numbers of VEEGAN and PacGAN on a mixture."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in read(PUBLISHED).pick(experiment="mog").rows:
        data, _, method = row["setting"].partition(" ")
        if data == mixture:
            cell = row["value"] + f" ± {row['error']}" * bool(row["error"])
            key = (row["source"], method, row["unroll_steps"])
            found.setdefault(key, {})[row["metric"]] = cell
    metrics = (MODES, SHARP, "reverse_kl")
    lines = [
        (method, k, *(cells.get(metric, "") for metric in metrics), source)
        for (source, method, k), cells in found.items()
    ]
    return table(("published", "K", "modes", "% high quality", "reverse KL", "source"), lines)


def goal(records: Records, *names: str) -> tuple[dict[str, str], str]:
    """Return the setting that comes nearest to all modes and 90 % high quality, and how near."""

    def reached(values: Sequence[str]) -> tuple[float, float]:
        own = records.pick(**dict(zip(names, values, strict=True)))
        return moments(own.values(MODES))[0], moments(own.values(SHARP))[0]

    (modes, quality), best = max((reached(values), values) for values in records.settings(*names))
    setting = dict(zip(names, best, strict=True))
    verdict = "is reached" if modes == 8 and quality >= 90 else "is not reached"
    named = ", ".join(f"{HEADS.get(name, name)} {value}" for name, value in setting.items())
    text = f"The best: {modes:.2f} modes and {quality:.1f} %, with {named}."
    return setting, f"A goal of 8 modes in every seed and 90 % high quality {verdict}. {text}"


def arms_of(records: Records) -> list[Arm]:
    """Return the values of K at the longest of the lengths that have most of them."""
    lengths = [n for (n,) in records.settings("pairs")]
    pairs = max(lengths, key=lambda n: (len(records.pick(pairs=n).settings(K)), int(n)))
    preset, batch = (records.rows[0][name] for name in ("preset", "batch_size"))
    return [
        (f"{preset} {batch} K={k}", {"preset": preset, "batch_size": batch, "pairs": pairs, K: k})
        for (k,) in records.pick(pairs=pairs).settings(K)
    ]


def mog_seeds(records: Records) -> str:
    """Return the section on Fig. 2 and on the mixtures of VEEGAN and PacGAN."""
    side_by_side = records.pick(mixture="fig2")
    ring = Records([*read(ALONE).rows, *side_by_side.rows])
    groups = [
        ring.pick(preset=preset, batch_size=batch)
        for preset, batch in ring.settings("preset", "batch_size")
        if preset != "notebook"
    ]
    commanded = sorted(groups, key=lambda own: "mixture" not in own.rows[0])
    arms = [arms_of(own) for own in groups]

    def ends(metric: str) -> list[Comparison]:
        return [c for each in arms for c in better(ring, metric, each[-1], each[0])]

    def ladder(metric: str) -> list[Comparison]:
        steps = [step for each in arms for step in pairwise(each)]
        return [c for less, more in steps for c in better(ring, metric, more, less)]

    everywhere = []
    for name, setting in (each[-1] for each in arms):
        full = [value == 8 for value in ring.pick(**setting).values(MODES)]
        everywhere.append(Count(f"{name} seeds with 8 of 8", full, every=True))

    protocols = "\n\n".join(
        f"{text}, ours, again by {_command(own)}:\n\n"
        f"{runs(own, *SETTING)}\n\n{published(mixture)}\n\n"
        f"![Samples over training](../figures/mog_seeds_quick_{mixture}.png)\n\n"
        f"*The {mixture}: generated samples of seed 0 over training.*"
        for mixture, text in (("ring", "The ring"), ("grid", "The grid"))
        if (own := records.pick(mixture=mixture)).rows
    )
    drawn = [preset for (preset,) in side_by_side.settings("preset") if preset != "notebook"]
    return f"""## Fig. 2: eight Gaussians on a ring

`mog_seeds.py`: the runs of `mog.py`, many seeds side by side, each as it would be alone. A mode
counts with one high-quality sample (within three deviations of it) of 2,500; "a quarter share" asks
for a quarter of the samples that the mode should have, all of high quality. "Reverse KL, HQ" is
PacGAN's, over the high-quality samples (n/a where a seed had none), "all" counts every sample for
its nearest mode. "Rotations" counts how often the mode that holds more than half of the samples
changes between two evaluations. Perfect samples are 98.89 % high quality. Samples spread evenly
over the ring's disc, blind to the modes, would be 0.72 % and still hit most of them: modes say
little where the quality is no higher, and a quarter share is then the measure.

Scaled down: the pairs of updates and the batches below, for the 25,000 pairs of Appendix A and our
batches of 512. `paper` has its learning rates, 1e-4; `quick` has 1e-3. Claims are judged for each
preset and batch size, which name the arms, at the longest runs that have most values of K. Again:
{"; ".join(map(_command, commanded))}. {_missing(records)}

{runs(ring.pick(preset="paper"), *SETTING)}

{runs(ring.pick(preset="quick"), *SETTING)}

{claims((
    ("paper", "with the most steps it spreads over all modes",
     [*everywhere, *ends(MODES), *ends(SHARE), *ends(EVEN)]),
    ("paper", "without unrolling it rotates through the modes", ends(ROTATIONS)),
    ("ours", "more steps cover more modes", ladder(MODES)),
    ("ours", "more steps spread more evenly", ladder(EVEN)),
    ("ours", "more steps rotate less", ladder(ROTATIONS)),
    ("ours", "more steps are sharper", ladder(SHARP)),
    ("VEEGAN", "five steps cover more modes than none, on its ring and grid", [
        comparison for mixture in ("ring", "grid")
        if (own := records.pick(mixture=mixture)).rows
        for comparison in better(own, MODES, *(
            (f"{mixture} K={k}", setting)
            for k in ("5", "0") for _, setting in arms_of(own) if setting[K] == k
        ))
    ]),
))}

{chr(10).join(map(_figures, drawn))}
{_notebook(side_by_side.pick(preset="notebook"))}
### The mixtures of VEEGAN and PacGAN

The ring of radius 1 and deviation 0.01 and the 5x5 grid from -4 to 4 of deviation 0.05, as PacGAN's
code has them, and its metrics. The networks and rates are ours, and smaller than VEEGAN's and
PacGAN's: numbers compare within a table and hardly across, as the two rows of GAN show.

{protocols or "Not recorded yet."}
"""  # fmt: skip


def listed(records: Records) -> str:
    """Return the values of K, for a command line."""
    return " ".join(k for (k,) in records.settings(K))


def _command(own: Records) -> str:
    """Return how the longest runs of a setting are made again."""
    pairs = own.settings("pairs")[-1][0]
    first = own.pick(pairs=pairs).rows[0]
    length = f"--preset {first['preset']} --iterations {pairs} --unroll-steps {listed(own)}"
    if "mixture" not in first:
        return f"`python examples/mog.py {length} --seeds 10 --record`"
    mixture = "" if first["mixture"] == "fig2" else f" --mixture {first['mixture']}"
    size = f"--batch-size {first['batch_size']}{mixture}"
    return f"`python examples/mog_seeds.py {length} {size} --record --figures`"


def _figures(preset: str) -> str:
    return f"""![Samples over training](../figures/mog_seeds_{preset}_fig2.png)

*Generated samples of seed 0 over training, `{preset}`.*

![Metrics over training](../figures/mog_seeds_{preset}_fig2_curves.png)

*Metrics over training, `{preset}`: thin lines are seeds, thick ones their means.*
"""


def _missing(records: Records) -> str:
    """Return what was to be run and was not."""
    wanted: dict[str, dict[str, object]] = {
        f"`paper` with K={k} at 25,000 pairs": {"preset": "paper", "pairs": 25_000, K: k}
        for k in (0, 1, 5, 10)
    }
    wanted |= {f"`notebook` with K={k}": {"preset": "notebook", K: k} for k in (0, 5)}
    for mixture in ("ring", "grid"):
        names = {k: f"the {mixture} with K={k}" for k in (0, 5, 10)}
        wanted |= {name: {"mixture": mixture, K: k} for k, name in names.items()}
    missing = [name for name, setting in wanted.items() if not records.pick(**setting).rows]
    return f"Not run, for time: {'; '.join(missing)}." if missing else ""


def _notebook(records: Records) -> str:
    if not records.rows:
        return ""
    first = records.rows[0]
    return f"""
### The authors' notebook

Preset `notebook` (`mog.py --help`), with 8 distinct modes. Scaled down: {int(first["pairs"]):,}
pairs for 25,000, batches of {first["batch_size"]} for 512. Again: {_command(records)}.

{runs(records, *SETTING)}
"""
