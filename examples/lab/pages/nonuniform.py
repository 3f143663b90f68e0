"""The section on the mixture of unequal weights."""

from lab.pages.claims import Comparison, Records, claims
from lab.pages.planar_table import planar


def mog_nonuniform(records: Records) -> str:
    """Return the section on the non-uniform mixture."""
    quick = records.pick(preset="quick").most("pairs")
    pairs = quick.rows[0]["pairs"]

    def arm(activation: str, deviation: float, k: int, first: bool) -> dict[str, object]:
        setting = {"activation": activation, "weight_deviation": deviation}
        return setting | {"unroll_steps": k, "stop_gradient": first}

    def better(
        activation: str, deviation: float, first: bool, *, says: str = "larger"
    ) -> list[Comparison]:
        text = f"KL, {activation} {deviation}, K=0 against 10"
        off, on = arm(activation, deviation, 0, False), arm(activation, deviation, 10, first)
        return quick.compare(text, "reverse_kl_all", off, on, says=says)

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
        *better("tanh", 0.12, True, says="not larger"),
        *better("relu", 0.12, True, says="not larger"),
    ]),
    ("ours", "the missing second term matters: the whole gradient does better than the first term",
     [comparison for setting in everything for comparison in missing(*setting)]),
))}

{figures}
"""  # fmt: skip
