"""The section on RS-GAN's image experiments."""

from pathlib import Path

from lab.pages.claims import Comparison, Records, Row, brief, claims, read, table, wrapped
from lab.pages.evaluate import METRICS

ARM = ("game", "unroll_steps")
STANDARD = {"unroll_steps": 0}
GAMES = {"JS": "the JS-GAN", "Rp": "RpGAN"}
GROUP = ("preset", "structure", "width", "batch_size", "pairs", "samples", "data", "features")
PAPER_PAIRS, PLANNED = 100_000, 300
NETWORKS = {"dcgan": "SN-DCGAN", "resnet": "SN-ResNet"}


def rsgan(results: Path) -> str:
    """Return the section, or "" without a record."""
    every = read(results / "rsgan.csv")
    if not every.rows:
        return ""
    groups = [
        every.pick(**dict(zip(GROUP, values, strict=True))) for values in every.settings(*GROUP)
    ]
    main = max(groups, key=lambda records: len(records.rows))
    first, others = main.rows[0], [group for group in groups if group is not main]
    text = f"""`rsgan.py`: the JS-GAN (non-saturating, as in the authors' code) against RpGAN, with
        the networks and settings of the code beside Sun, Fang and Schwing (2020), and K look-ahead
        steps of D in the generator's loss. Presets are their commands for CIFAR-10 and STL-10, each
        with the SN-DCGAN and the SN-ResNet, at regular, half and quarter width. The paper's table
        of FIDs is not quoted: with so few pairs and other features nothing here compares with it.
        Metrics are of {int(first["samples"]):,} samples against as many test images, by the
        features of the {first["features"]}, so they rank the arms below alone. Images are
        normalised over batches of 500, as in the authors' evaluation. Their code normalises D's
        last layer after RpGAN's steps alone; as a single row under spectral normalisation it has
        unit norm in both games anyway. The power iteration stands still in the look-ahead."""
    return f"""## RS-GAN on images

{wrapped(text)}

{wrapped(_scale(main))} Again:
`{_command(main)}`.

{_arms(main)}

{claims((
    ("RS-GAN", f"RpGAN does better than JS-GAN with narrow networks (K=0, {first['width']} width)",
     _better(("JS, K=0", main.pick(game="JS", **STANDARD)),
             ("Rp, K=0", main.pick(game="Rp", **STANDARD)))),
    *(("ours", f"looking ahead helps {name}", _ahead(main, main, game))
      for game, name in GAMES.items()),
    *(("ours", f"looking ahead helps {name} against K=0 at {longer.rows[0]['pairs']} pairs",
       _ahead(main, longer, game))
      for longer in others if _alike(main, longer) for game, name in GAMES.items()),
), early=int(first["pairs"]) < PLANNED)}

FID falls and F_8 rises where an arm is better. Seconds are CPU time, of a run.

![Samples](../figures/rsgan_{first["preset"]}.png)

*Samples of fixed noise over training, the first seed.*
{_curves(first)}{_others(others)}"""  # fmt: skip


def _scale(records: Records) -> str:
    row, pairs = records.rows[0], int(records.rows[0]["pairs"])
    counts = sorted(
        {len(records.pick(**dict(zip(ARM, a, strict=True))).rows) for a in _ran(records)}
    )
    name, _, images = row["data"].partition(", ")
    data = "CIFAR-10" if name == "cifar10" else f"`{name}`, a part of CIFAR-10's"
    return (
        f"Scaled down: {row['width']} width of the {NETWORKS[row['structure']]}, {pairs:,} pairs "
        f"of updates for {PAPER_PAIRS:,}, batches of {row['batch_size']} for 64, {images} for "
        f"50,000 ({data}), {'-'.join(map(str, counts))} seeds an arm."
        + " Short of the few hundred pairs that were planned: G has hardly begun, no arm makes "
        'images yet, and "no difference" is weak evidence. `--resume` with more `--iterations` '
        "deepens the record." * (pairs < PLANNED)
    )


def _curves(row: Row) -> str:
    """Return the figure of the metrics, where there are enough moments to draw."""
    if int(row["pairs"]) < 3 * int(row["evaluate_every"]):
        return ""
    return f"""
![Metrics over training](../figures/rsgan_{row["preset"]}_curves.png)

*Metrics over training: thin lines are seeds, thick ones their means.*
"""


def _alike(records: Records, longer: Records) -> bool:
    """Return whether runs differ in their length alone."""
    pairs = zip(*(group.settings(*GROUP)[0] for group in (records, longer)), strict=True)
    return [name for name, (a, b) in zip(GROUP, pairs, strict=True) if a != b] == ["pairs"]


def _ran(records: Records) -> list[tuple[str, ...]]:
    return records.settings(*ARM)


def _command(records: Records) -> str:
    row = records.rows[0]
    games, ks = (" ".join(value for (value,) in records.settings(name)) for name in ARM)
    return (
        f"python examples/rsgan.py --preset {row['preset']} --data-root FOLDER --features "
        f"CLASSIFIER.pt --games {games} --unroll-steps {ks} --iterations {row['pairs']} "
        f"--seeds {len(records.settings('seed'))} --record --figures"
    )


def _arms(records: Records) -> str:
    lines = []
    for game, k in _ran(records):
        own = records.pick(game=game, unroll_steps=k)
        values = [brief(own.values(name), digits) for name, (_, digits) in METRICS.items()]
        seconds = f"{sum(own.values('seconds')) / len(own.rows):.0f}"
        lines.append((game, k, str(len(own.rows)), *values, seconds))
    labels = (label for label, _ in METRICS.values())
    return table(("game", "K", "seeds", *labels, "seconds"), lines)


def _ahead(records: Records, standard: Records, game: str) -> list[Comparison]:
    """Compare every K > 0 with K=0, which may be of another length."""
    base = standard.pick(game=game, **STANDARD)
    length = f" at {base.rows[0]['pairs']} pairs" * (standard is not records) if base.rows else ""
    return [
        comparison
        for (k,) in records.pick(game=game).settings("unroll_steps")
        if k != "0"
        for comparison in _better(
            (f"K=0{length}", base), (f"K={k}", records.pick(game=game, unroll_steps=k))
        )
    ]


def _better(worse: tuple[str, Records], better: tuple[str, Records]) -> list[Comparison]:
    """Compare two arms, with names: the second is claimed to be better."""
    (low, bad), (high, good) = worse, better
    if not bad.rows or not good.rows:
        return []
    return [
        Comparison(f"FID, {low} against {high}", bad.values("fid"), good.values("fid")),
        Comparison(f"F_8, {high} against {low}", good.values("f_8"), bad.values("f_8")),
    ]


def _others(groups: list[Records]) -> str:
    parts = [f"\n{wrapped('Also run. ' + _scale(group))}\n\n{_arms(group)}\n" for group in groups]
    return "".join(parts)
