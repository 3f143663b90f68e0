"""The section on Table 1: the thousand modes of stacked MNIST."""

from fractions import Fraction
from pathlib import Path

from lab.pages.claims import Claim, Comparison, Count, Records, brief, claims, read, shown, table

ALL, STEPS, PAPER_PAIRS = 1000, (0, 1, 5, 10), 50_000
SIZES = {"0.25": "1/4", "0.5": "1/2"}
METRICS = ("modes", "reverse_kl")
STEP = "unroll_steps"
RATES = ("generator_lr", "discriminator_lr")
CURVE_HEAD = {"size": "D", "unroll_steps": "K", "batch_size": "batch"}
CURVE_HEAD |= {"generator_lr": "rate of G", "discriminator_lr": "of D"}
HEAD = ("D", "K", "pairs", "seeds", "modes", "reverse KL", "modes, paper", "KL, paper")
HEAD += ("modes, PacGAN's re-run", "KL, PacGAN's re-run")


def evaluations(path: Path) -> Records:
    """Return the rows of the record of Table 1, the last of those that were recorded again."""
    names = "preset", "networks", "size", "unroll_steps", "batch_size", *RATES, "seed", "pairs"
    return Records(list({tuple(row[n] for n in names): row for row in read(path).rows}.values()))


def finished(records: Records) -> Records:
    """Return the last row of every run of the length that most have: those with all samples."""
    return Records([row for row in records.rows if row["modes"]]).most("pairs")


def stacked_mnist(results: Path) -> str:
    """Return the section, or "" without a record."""
    whole = evaluations(results / "stacked_mnist.csv")
    every = whole.pick(preset="small", networks="E")
    last = finished(every)
    if not last.rows:
        return ""
    published = read(results / "published.csv").pick(experiment="stacked_mnist")
    first = last.rows[0]
    return f"""## Table 1: the thousand modes of stacked MNIST

`stacked_mnist.py`: a random digit in each of three colours, 1,000 modes, and D a quarter or a half
as wide as G; the networks of Appendix E, cut from 32 pixels to the digits' 28 as PacGAN's are, with
X scaling D alone, the rates of Appendix D where the preset has none of its own, and G's
non-saturating loss, its activations leaky ReLUs as in the paper (PacGAN's are ReLUs).
{int(first["samples"]):,} samples at the end of training, through the classifier
of `train_classifier.py`, give the modes with at least one sample and KL(model || uniform) in nats,
without smoothing. It has no class for what is no digit, so that different blobs count as different
modes: look at the samples, too. {_data(results)}

Scaled down, of `paper`: {int(first["pairs"]):,} pairs of updates for 50,000 (PacGAN's re-run has
500,000), batches of {first["batch_size"]} for 128, learning rates of {first["generator_lr"]} and
{first["discriminator_lr"]} for 1e-4 and 2e-4. Our numbers, and the verdicts on them, are of the
beginning of training: compare them within the table, and their order with the published
ones.{_not_run(last)} Again:
{_commands(last)}; with
`--resume` and more `--iterations` or `--seeds` the same runs go on.

{table(HEAD, _lines(last, published))}
{_too_early(last)}
{claims(_claims(last, finished(whole.pick(networks="D"))))}

Modes over training are those of {int(first["curve_samples"]):,} samples:

{_curve(every, "size", "unroll_steps")}

![Modes against pairs](../figures/stacked_mnist_curves.png)

*Modes and reverse KL of {int(first["curve_samples"]):,} samples against pairs of updates: means
over seeds, with standard errors.*

![Samples](../figures/stacked_mnist_small_E.png)

*Samples of seed 0 over training.*
{_tried(results)}
Published, of the same experiment with other methods:

{table(("networks", "modes", "reverse KL", "of"), _others(published))}
"""  # fmt: skip


def _lines(last: Records, published: Records) -> list[tuple[str, ...]]:
    lines = []
    for size, name in SIZES.items():
        for k in STEPS:
            own = last.pick(size=size, unroll_steps=k)
            ours = ("", "0", "not run", "")
            if own.rows:
                modes, kl = (brief(own.values(c), d) for c, d in (("modes", 1), ("reverse_kl", 3)))
                ours = (f"{int(own.rows[0]['pairs']):,}", str(len(own.rows)), modes, kl)
            cells = [
                _published(published.pick(setting=setting, unroll_steps=k, metric=metric))
                for setting in (f"D={name}", f"D={name} DCGAN")
                for metric in ("modes", "reverse_kl")
            ]
            lines.append((name, str(k), *ours, *cells))
    return lines


def _published(found: Records) -> str:
    return " ".join(
        row["value"] + (f" ± {row['error']}" if row["error"] else "") for row in found.rows
    )


def _others(published: Records) -> list[tuple[str, ...]]:
    rest = Records([r for r in published.rows if not r["source"].startswith("Metz")])
    rest = Records([r for r in rest.rows if r["setting"] not in {"D=1/4 DCGAN", "D=1/2 DCGAN"}])
    return [
        (setting, *(_published(rest.pick(setting=setting, metric=m)) for m in METRICS), source)
        for setting, source in dict.fromkeys((r["setting"], r["source"]) for r in rest.rows)
    ]


def _data(results: Path) -> str:
    scores = read(results / "stacked_mnist_data.csv").most("samples")
    if not scores.rows:
        return "The score of real stacks is not recorded yet."
    first = scores.rows[0]
    return (
        f"{int(first['samples']):,} stacks of training digits score "
        f"{shown(scores.values('modes'), 1)} modes and {shown(scores.values('reverse_kl'), 4)} "
        f"({len(scores.rows)} draws): the floor of the KL. The classifier is right on "
        f"{first['test_accuracy']} % of the test digits (hash {first['classifier']})."
    )


def _commands(last: Records) -> str:
    """Return how the runs are made again: all K at the seeds that all have, then the others."""
    counts = {k: len(last.pick(unroll_steps=k).settings("seed")) for (k,) in last.settings(STEP)}
    few, many = min(counts.values()), max(counts.values())
    start = f"python examples/stacked_mnist.py --iterations {last.rows[0]['pairs']} --unroll-steps"
    found = [f"`{start} {' '.join(counts)} --seeds {few} --record --figures`"]
    if many > few:
        ks = " ".join(k for k, count in counts.items() if count == many)
        found.append(f"`{start} {ks} --seed {few} --seeds {many - few} --record`")
    return ", ".join(found)


def _too_early(last: Records) -> str:
    if max(last.values("modes")) > 1:
        return ""
    return (
        "\nNo run has more than one mode: at this length the samples are not digits yet, and the "
        "table says nothing about the claims.\n"
    )


def _not_run(last: Records) -> str:
    ran = set(last.settings("size", "unroll_steps"))
    missing = [f"D = {n} with K={k}" for s, n in SIZES.items() for k in STEPS
               if (s, str(k)) not in ran]  # fmt: skip
    return f" Not run, for time: {'; '.join(missing)}." if missing else ""


def _claims(last: Records, large: Records) -> list[Claim]:
    modes, kl, one_step = [], [], list[Comparison]()
    for size, name in SIZES.items():
        none, one, ten = ({"size": size, "unroll_steps": k} for k in (0, 1, 10))
        if name == "1/2":  # as in the paper; at 1/4 its one step covers more
            one_step = last.compare(f"modes, D = {name}, K=0 against 1", "modes", none, one)
        modes += last.compare(f"modes, D = {name}, K=10 against 0", "modes", ten, none)
        kl += last.compare(f"reverse KL, D = {name}, K=0 against 10", "reverse_kl", none, ten)
    gains = [_gains(last.pick(size=size)) for size in SIZES]
    grows = [Comparison("modes gained, D = 1/4 against 1/2", *gains)] if all(gains) else []
    standard = large.pick(size=1.0, unroll_steps=0)
    covered = standard.values("modes")
    all_of_them, early = [], False
    if covered:
        first = standard.rows[0]
        early = int(first["pairs"]) < PAPER_PAIRS / 10
        text = f"seeds with {ALL:,} modes, App. D's networks with K=0 after {first['pairs']} pairs"
        text += f" at learning rates of {first['generator_lr']}, {shown(covered, 0)} on average"
        all_of_them = [Count(text, [modes == ALL for modes in covered], every=True)]
    return [
        ("paper", "ten steps cover more modes than none, at both sizes", modes),
        ("paper", "ten steps have a lower reverse KL than none, at both sizes", kl),
        ("paper", "the benefit of ten steps grows as D shrinks", grows),
        ("paper", "networks of App. D's size cover all modes with K=0", all_of_them, early),
        ("paper", "one step covers fewer modes than none at D = 1/2", one_step),
    ]


def _gains(of_size: Records) -> list[float]:
    """Return by how many modes ten steps are ahead of none, seed by seed."""
    none, ten = (
        {row["seed"]: float(row["modes"]) for row in of_size.pick(unroll_steps=k).rows}
        for k in (0, 10)
    )
    return [ten[seed] - none[seed] for seed in sorted(none.keys() & ten.keys())]


def _curve(every: Records, *names: str) -> str:
    """Return the modes over training, a line a setting of these names."""
    pairs = sorted({int(row["pairs"]) for row in every.rows})
    moments_shown = pairs[:: max(len(pairs) // 6, 1)]
    lines = []
    for setting in every.settings(*names):
        which = dict(zip(names, setting, strict=True))
        own = every.pick(**which)
        cells = [own.pick(pairs=moment).values("curve_modes") for moment in moments_shown]
        which["size"] = f"{Fraction(which['size'])}"
        lines.append((*which.values(), *(brief(c, 0) if c else "" for c in cells)))
    head = [CURVE_HEAD[name] for name in names]
    return table((*head, *(f"{moment:,} pairs" for moment in moments_shown)), lines)


def _tried(results: Path) -> str:
    """Return what the search for learning rates found, or "" without a record of it."""
    tried = evaluations(results / "stacked_mnist_rates.csv")
    if not tried.rows:
        return ""
    return f"""
The rates of this table were found by trying, with seed 0 alone; modes are those of
{int(tried.rows[0]["curve_samples"]):,} samples:

{_curve(tried, *RATES, "batch_size", "size", "unroll_steps")}
"""
