"""The section on Fig. 4: training on CIFAR-10."""

from pathlib import Path

from lab.pages.claims import Records, moments, read, shown, table, wrapped

K = "unroll_steps"
SCALE = ("preset", "data", "images", "size", "pairs", "batch_size")
CIFAR10 = 50_000  # training images
ENOUGH = 1000  # pairs, to judge a claim by: ours
ASKED = "at least 2,000 pairs and 3 seeds for each of K=0, 1, 5 and 10"
COST = """What the preset `paper` would take on the machine of the record, one core, from its first
pairs: 100,000 updates of a player, 5 seeds."""
FULL = {"pairs": 50_000, "seeds": 5}  # of Appendix D and Section 3.4


def training(results: Path) -> str:
    """Return the section on Fig. 4 and on what training costs."""
    records = read(results / "cifar10.csv")
    own = largest(records)
    if not own.rows:
        return ""
    first = own.rows[0]
    lines = []
    for (k,) in own.settings(K):
        seeds = own.pick(**{K: k})
        losses = [shown(seeds.values(name), 3) for name in ("d_loss", "f_0", "f_K")]
        each = f"{moments(seeds.values('seconds'))[0] / int(first['pairs']):.2f}"
        lines.append((k, str(len(seeds.rows)), *losses, each))
    head = ("K", "seeds", "D's loss", "f_0", "f_K", "CPU seconds a pair")
    text = """The networks of Appendix D (G of transposed convolutions, D of convolutions: the
        appendix swaps the words), 3x3, with BatchNorm and leaky ReLU 0.3, Adam with 1e-4 for G and
        2e-4 for D, the non-saturating game. f_0 is G's loss at the D of the moment, f_K the one
        that it minimises, at the D that has looked ahead; losses are averages over about the last
        ten pairs. Where K > 0, f_0 costs a pass of D that training does not need, within the
        seconds. Weights start as DCGAN's do, N(0, 0.02^2): the paper is silent."""
    return f"""## Fig. 4: CIFAR-10 by convolutional networks

{wrapped(text)}

{wrapped(scale(own))} Again:
`{command(own)}`.

{table(head, lines)}

{wrapped(COST)}

{_projected(records.pick(preset="paper"))}

![Samples](../figures/cifar10_samples.png)

*Samples of seed 0 after the last pair, as in Fig. 4.*

![Samples over training](../figures/cifar10_training.png)

*Samples of the same noise over training.*

![Losses](../figures/cifar10_losses.png)

*Losses over training: thin lines are seeds, thick ones their means.*
"""


def largest(records: Records, *more: str) -> Records:
    """Return the rows of the setting that the most models were run at; no start of `paper`."""
    names = (*SCALE, *more)
    found = [dict(zip(names, values, strict=True)) for values in records.settings(*names)]
    groups = [records.pick(**setting).rows for setting in found]
    last = [{(row[K], row["seed"], row.get("image")): row for row in rows} for rows in groups]
    own = [Records([*rows.values()]) for rows in last]  # the last of what was recorded twice
    return max(
        own, key=lambda r: (len(r.settings(K, "seed")), int(r.rows[0]["pairs"])), default=records
    )


def scale(records: Records) -> str:
    """Return what was scaled down."""
    first, ks = records.rows[0], [k for (k,) in records.settings(K)]
    pairs, images = int(first["pairs"]), int(first["images"])
    seeds = sorted({len(records.pick(**{K: k}).settings("seed")) for k in ks})
    data = "CIFAR-10" if images == CIFAR10 else f"`{first['data']}`, a part of CIFAR-10's images"
    each = "-".join(map(str, seeds))
    short = pairs < 2000 or seeds[0] < 3 or len(ks) < 4
    near = (
        f"Fewer than {ENOUGH:,} pairs leave G close to its initial state: its samples are noise "
        "yet, and claims get no verdict."
    )
    return (
        f"Scaled down: X = {float(first['size']):g} of the paper's channels, {pairs:,} pairs of "
        f"updates for {FULL['pairs']:,}, batches of {first['batch_size']} for our 128, "
        f"{images:,} training images for {CIFAR10:,} ({data}), {each} seeds of each K for "
        f"{FULL['seeds']}."
        + f" {near}"
        * (pairs < ENOUGH)
        + f" This is short of what was planned, {ASKED}: longer runs with `--resume` deepen the "
        "record." * short
    )


def early(records: Records) -> bool:
    """Return whether the runs are too short for a verdict."""
    return int(records.rows[0]["pairs"]) < ENOUGH


def command(records: Records) -> str:
    """Return the command that trains the models again."""
    first = records.rows[0]
    ks = " ".join(k for (k,) in records.settings(K))
    seeds = len(records.settings("seed"))
    flags = f"--preset {first['preset']} --size {first['size']} --batch-size {first['batch_size']}"
    return (
        f"python examples/cifar10.py {flags} --iterations {first['pairs']} --unroll-steps {ks} "
        f"--seeds {seeds} --data-root FOLDER --record --figures"
    )


def _projected(paper: Records) -> str:
    lines = []
    for k, pairs in paper.settings(K, "pairs"):
        row = paper.pick(**{K: k, "pairs": pairs}).rows[-1]
        each = float(row["seconds"]) / int(pairs)
        days = each * FULL["pairs"] * FULL["seeds"] / 86_400
        lines.append((k, row["size"], row["batch_size"], pairs, f"{each:.1f}", f"{days:,.0f}"))
    head = ("K", "X", "batch", "pairs run", "CPU seconds a pair", "CPU days in all")
    return table(head, lines) if lines else "Not run yet."
