"""The section on Table 2: the colours of coloured MNIST."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.pages.claims import Comparison, Records, brief, claims, moments, read, table

K, JS = "unroll_steps", "js_divergence"
SCALE = ("base", "generator_lr", "discriminator_lr", "batch_size", "pairs")
SIZES, STEPS = ("1/4", "1/2", "1"), (0, 1, 5, 10)
SHORT = """Every cell is nearer to a single colour than to the data: these trainings are too
short to tell what they would come to.
"""


def colored_mnist(results: Path) -> str:
    """Return the section, or "" without a record."""
    every = _largest(read(results / "colored_mnist.csv").pick(preset="small"))
    if not every.rows:
        return ""
    first, published = every.rows[0], _published(results / "published.csv")
    sizes = sorted((size for (size,) in every.settings("size")), key=_number)
    cells = [(x, k) for x in sizes for (k,) in every.pick(size=x).settings(K)]
    counts = {len(every.pick(size=x, unroll_steps=k).rows) for x, k in cells}
    seeds = "-".join(map(str, sorted({min(counts), max(counts)})))
    lines = []
    for x, k in cells:
        own = every.pick(size=x, unroll_steps=k)
        nats = own.values(JS)
        lines.append((
            *(x, k, str(len(nats)), brief(nats, 3), brief([v / math.log(2) for v in nats], 3)),
            published.get((f"X={x}", k), ""),
            brief(own.values("colour_variance"), 2),
            brief([100 * v for v in own.values("discarded")], 1),
            f"{1000 * moments(own.values('seconds_a_pair'))[0]:,.0f}",
            f"{moments(own.values('images_a_second'))[0]:,.0f}",
        ))  # fmt: skip
    head = ("X", "K", "seeds", "JS, nats", "JS, bits", "JS, paper", "variance", "% discarded")
    head += ("ms a pair", "images a second")
    floor, single = (brief(every.values(name), 3) for name in ("js_floor", "js_single_colour"))
    dark = brief([100 * value for value in every.values("discarded_data")], 2)
    standard = every.pick(unroll_steps=0)
    pipeline = [
        100 * float(row["data_seconds_a_pair"]) / float(row["seconds_a_pair"])
        for row in standard.rows
    ]
    missing = [f"X = {x}, K = {k}" for x in SIZES for k in STEPS if (x, str(k)) not in cells]
    lowest = min(moments(every.pick(size=x, unroll_steps=k).values(JS))[0] for x, k in cells)
    short = lowest > moments(every.values("js_single_colour"))[0] / 2
    by_size = {x: _ahead(every.pick(size=x)) for x in sizes}
    return f"""## Table 2: the colours of coloured MNIST

`colored_mnist.py`: digits of one colour each, normal with deviation 0.5, with noise at each pixel
and channel, drawn anew for every batch; the networks of Appendix F, where X scales G and D. (That
appendix takes 4x4 to 32x32, so the digits have a margin of two pixels.) The colour of a digit is
the centre of the cluster farther from black, of two by k-means from black and the pixel farthest
from it. An image whose two centres are closer than 0.4, two deviations of the noise, is discarded:
{dark} % of the data are. The JS divergence is that of Gaussian kernel densities of
{int(first["samples"]):,} colours each, both with the kernel that Scott's rule gives the data, by
Monte Carlo over draws from the densities. The paper names neither the base of its logarithm nor any
of these choices, so the column beside ours is to be compared in its order only.

Data against other data has a JS divergence of {floor} nats, the floor; one colour for all
digits, the mean, {single}; ln 2 = 0.693 is the most there can be. "Variance" is that of the colours
found, of the data's.

Scaled down: X is a part of {first["base"]} of the paper's widths, {int(first["pairs"]):,} pairs of
updates for 50,000, batches of {first["batch_size"]} for 128, learning rates of
{float(first["generator_lr"]):g} for 1e-4 (G) and {float(first["discriminator_lr"]):g} for 2e-4 (D),
{int(first["samples"]):,} samples for 10,000; seeds of each cell: {seeds}.{_not_run(missing)}
Widths and rates were chosen by what K=0 does with them (seed 0, X = 1/4 and 1).
Colouring the batches takes {brief(pipeline, 1)} % of the time of a pair at K=0, whose networks are
tiny. Times are CPU times on a machine that did other work beside, and images those of the data that
a training goes through. Again:
`python examples/colored_mnist.py --iterations {first["pairs"]} --seeds {max(counts)} --record
--figures`.

{table(head, lines)}

{SHORT if short else ""}
The better of 5 and 10 steps is chosen by its mean over the seeds that judge it, which favours it a
little.

{claims([
    *(
        ("paper", f"the better of 5 and 10 steps beats none (X = {x})", found)
        for x, found in by_size.items()
    ),
    ("paper", "one step does worse than none, as in its table at every X", [
        comparison
        for x in sizes
        for comparison in every.pick(size=x).compare(
            f"JS, X = {x}, K=1 against 0", JS, {K: 1}, {K: 0}
        )
    ]),
], early=short)}

![Samples](../figures/colored_mnist_samples.png)

*Samples at the end, seed 0, as in Fig. App.5.*

![Colours](../figures/colored_mnist_colours.png)

*The colours found in samples and data, by red and green, seed 0.*

![JS divergence](../figures/colored_mnist_js.png)

*JS divergence against K: dots are seeds, lines their means, bars standard errors.*
"""  # fmt: skip


def _ahead(own: Records) -> list[Comparison]:
    """Compare no steps with the better of 5 and 10, by its mean."""
    arms = {k: own.pick(unroll_steps=k).values(JS) for k in (5, 10)}
    found = {k: moments(values)[0] for k, values in arms.items() if values}
    if not found:
        return []
    best = min(found, key=lambda k: found[k])
    return own.compare(f"JS, K=0 against {best}", JS, {K: 0}, {K: best})


def _not_run(cells: Sequence[str]) -> str:
    return f" Not run: {'; '.join(cells)}." if cells else ""


def _number(size: str) -> float:
    top, _, bottom = size.partition("/")
    return int(top) / int(bottom or 1)


def _published(path: Path) -> Mapping[tuple[str, str], str]:
    """Return the paper's divergences by size and K."""
    return {
        (row["setting"], row[K]): f"{row['value']} ± {row['error']}"
        for row in read(path).rows
        if row["experiment"] == "colored_mnist"
    }


def _largest(records: Records) -> Records:
    """Return the rows of the scale that most were run at; the last of a run recorded twice."""
    scales = [dict(zip(SCALE, values, strict=True)) for values in records.settings(*SCALE)]
    groups = [records.pick(**scale).rows for scale in scales]
    once = [
        [*{(row["size"], row[K], row["seed"]): row for row in rows}.values()] for rows in groups
    ]
    return Records(max(once, key=lambda rows: (len(rows), int(rows[0]["pairs"])), default=[]))
