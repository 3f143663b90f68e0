"""The sections on the toys of RS-GAN: two clusters on a line, five Gaussians on a circle."""

from lab.pages.claims import Comparison, Count, Records, Row, Setting, Value, claims, shown, table
from lab.pages.planar_table import planar


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

    groups = {
        f"{start}, {preset}": records.pick(start=start, preset=preset).most("epochs")
        for start, preset in records.settings("start", "preset")
    }

    def arm(game: str, k: int = 0) -> dict[str, object]:
        return {"game": game, "unroll_steps": k}

    def each(
        text: str, column: Value, larger: Setting, smaller: Setting, named: str = ""
    ) -> list[Comparison]:
        """Compare two arms in every group whose name has a part."""
        return [
            comparison
            for name, runs in groups.items()
            if named in name
            for comparison in runs.compare(f"{text} ({name})", column, larger, smaller)
        ]

    def ahead(game: str) -> list[Comparison]:
        off, on = arm(game), arm(game, 5)
        return [
            *each("evaluations collapsed, K=0 against 5", "collapsed", off, on, "random"),
            *each("epochs until covered, K=0 against 5", until_covered, off, on),
            *each("seeds that cover at the end, K=5 against 0", "covers", on, off),
        ]

    js, rp = arm("JS"), arm("Rp")
    basin = [
        Count(f"JS seeds {text} ({name})", seen)
        for name, runs in groups.items()
        if "random" in name
        for text, column in (
            ("that were collapsed at an evaluation", "collapsed"),
            ("whose D was at the plateau then", "on_plateau"),
        )
        if (seen := [value > 0 for value in runs.pick(**js).values(column)])
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

`paper` is the authors' code, and `narrow` the same with 5 units a layer in D for 10 and 3 in G for
5, both at full length, 5,000 epochs. Scaled down: `quick` has five times the learning rates and the
epochs below. Again: `python examples/two_clusters.py --epochs 500 --games JS Rp minimax --record`,
with `--start collapsed --epochs 150`, and with `--preset paper` or `--preset narrow`.

{table(head, lines)}

{claims((
    ("RS-GAN", "the bad basin of the JS-GAN appears in training", basin),
    ("RS-GAN", "RpGAN has no such basin: it collapses less and covers both sooner", [
        *each("evaluations collapsed, JS against Rp", "collapsed", js, rp, "random"),
        *each("epochs until covered, JS against Rp", until_covered, js, rp),
    ]),
    ("RS-GAN", "RpGAN does better than JS-GAN with narrow networks",
     each("seeds that cover at the end, Rp against JS", "covers", rp, js, "narrow")),
    ("ours", "looking ahead removes the JS-GAN's basin", ahead("JS")),
    ("ours", "looking ahead removes the basin of the minimax game", ahead("minimax")),
    ("ours", "looking ahead helps RpGAN too", ahead("Rp")),
))}

Runs of the same preset, game, K and start are the same seeds at two lengths; claims are judged at
the length that most arms have.

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


def five_gaussians(records: Records) -> str:
    """Return the section on the five Gaussians."""
    brief = records.pick(preset="quick").most("pairs")
    full = records.pick(preset="paper").most("pairs")
    ((width,), *_) = brief.settings("width")
    pairs = brief.rows[0]["pairs"]
    narrow = brief.pick(width=width)
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

    def paired(runs: Records, text: str, normalise: bool = False) -> list[Comparison]:
        js, rp = ({**arms(game, 0), "normalise": normalise} for game in ("JS", "Rp"))
        return [
            *runs.compare(f"% high quality, Rp against JS{text}", "percent_high_quality", rp, js),
            *runs.compare(f"modes, Rp against JS{text}", "modes", rp, js),
        ]

    at_length = full.pick(width=width) if full.rows else full
    narrowly = [
        *paired(narrow, ""),
        *paired(narrow, ", both normalised", normalise=True),
        *paired(at_length, ", at full length"),
    ]
    return f"""## Five Gaussians

`five_gaussians.py`: five Gaussians of deviation 0.045 on the unit circle, the original GAN (JS)
against RpGAN. The authors keep D's last layer at unit norm in RpGAN alone; here it is off in both,
unless `normalise` says that it is on in both.

Scaled down: `quick` has learning rates of 1e-3 for 1e-4, the pairs below for 20,000, and {width}
units a layer for 128; `paper` with {width} units is the authors' code but for the width. Again:
`python examples/five_gaussians.py --iterations {pairs} --record`, with `--normalise`, with
`--width 128 --unroll-steps 0`, and `--preset paper --width {width} --unroll-steps 0`.

{planar(records, "preset", "pairs", "width", "normalise", "game", "unroll_steps")}

{claims((
    ("RS-GAN", f"RpGAN does better than JS-GAN with narrow networks (K=0, width {width})",
     narrowly),
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
