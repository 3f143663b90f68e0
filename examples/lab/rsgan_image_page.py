"""The section on RS-GAN's image experiments."""

import csv
from pathlib import Path

from lab.claims import Comparison, Records, Row, claims, shown, table
from lab.evaluate_page import METRICS

ARM = ("game", "unroll_steps")
GROUP = ("preset", "structure", "width", "batch_size", "pairs", "samples", "data", "features")
PAPER_PAIRS = 100_000


def rsgan(results: Path) -> str:
    """Return the section, or "" without a record."""
    path = results / "rsgan.csv"
    if not path.exists():
        return ""
    with path.open(newline="") as file:
        every = Records(list(csv.DictReader(file)))
    groups = [
        every.pick(**dict(zip(GROUP, values, strict=True))) for values in every.settings(*GROUP)
    ]
    main = max(groups, key=lambda records: len(records.rows))
    first = main.rows[0]
    return f"""## RS-GAN on images

`rsgan.py`: the JS-GAN (non-saturating, as in the authors' code) against RpGAN, with the networks
and settings of the code beside Sun, Fang and Schwing (2020), and K look-ahead steps of D in the
generator's loss. Presets are their commands for CIFAR-10 and STL-10, each with the SN-DCGAN and the
SN-ResNet, at regular, half and quarter width. The paper's table of FIDs is not quoted: with so few
pairs and other features nothing here compares with it.

**Scaled down:** {_scale(first)}. Metrics are of {int(first["samples"]):,} samples against as many
test images, by the features of the {first["features"]}, so they rank the arms below and compare
with nothing else; images are normalised over batches of 500, as in the authors' evaluation. One
more thing of their code has no counterpart: D's last layer is normalised after RpGAN's steps alone,
but as a single row under spectral normalisation it has unit norm anyway, in both games. Spectral
normalisation's power iteration stands still in the look-ahead. Again: `python examples/rsgan.py
--preset {first["preset"]} --data-root FOLDER --features CLASSIFIER.pt
--seeds {len(main.settings("seed"))} --iterations {first["pairs"]} --record --figures`.

{_arms(main)}

{claims((
    ("RS-GAN", f"RpGAN does better than JS-GAN with narrow networks (K=0, {first['width']} width)",
     _better(main, "JS against Rp", ("JS", "0"), ("Rp", "0"))),
    *(
        ("ours", f"looking ahead helps {name}", [
            comparison
            for (k,) in main.pick(game=game).settings("unroll_steps") if k != "0"
            for comparison in _better(main, f"K=0 against {k}", (game, "0"), (game, k))
        ])
        for game, name in (("JS", "the JS-GAN"), ("Rp", "RpGAN"))
    ),
))}

FID falls and F_8 rises where an arm is better. Seconds are CPU time.

![Samples](../figures/rsgan_{first["preset"]}.png)

*Samples of fixed noise over training, the first seed.*

![Metrics over training](../figures/rsgan_{first["preset"]}_curves.png)

*Metrics over training: thin lines are seeds, thick ones their means.*
{_others([group for group in groups if group is not main])}"""  # fmt: skip


def _scale(row: Row) -> str:
    return (
        f"{row['width']} width of the {row['structure'].replace('dcgan', 'SN-DCGAN')}, "
        f"{int(row['pairs']):,} pairs of updates for {PAPER_PAIRS:,}, batches of "
        f"{row['batch_size']} for 64; learning rates are the authors'; {row['data']}"
    )


def _arms(records: Records) -> str:
    lines = []
    for game, k in records.settings(*ARM):
        own = records.pick(game=game, unroll_steps=k)
        values = [_shown(own.values(name), digits) for name, (_, digits) in METRICS.items()]
        seconds = f"{sum(own.values('seconds')) / len(own.rows):.0f}"
        lines.append((game, k, str(len(own.rows)), *values, seconds))
    labels = (label for label, _ in METRICS.values())
    return table(("game", "K", "seeds", *labels, "seconds"), lines)


def _shown(values: list[float], digits: int) -> str:
    return shown(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def _better(
    records: Records, text: str, worse: tuple[str, str], better: tuple[str, str]
) -> list[Comparison]:
    worse_arm, better_arm = (dict(zip(ARM, arm, strict=True)) for arm in (worse, better))
    turned = " against ".join(reversed(text.split(" against ")))
    return [
        *records.compare(f"FID, {text}", "fid", worse_arm, better_arm),
        *records.compare(f"F_8, {turned}", "f_8", better_arm, worse_arm),
    ]


def _others(groups: list[Records]) -> str:
    parts = [f"\nAlso run: {_scale(group.rows[0])}.\n\n{_arms(group)}\n" for group in groups]
    return "".join(parts)
