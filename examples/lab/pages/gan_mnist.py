"""The section on Adam against SGD, and on the explanation of the collapse under SGD."""

from collections.abc import Callable
from pathlib import Path

from lab.pages.claims import Comparison, Records, Row, brief, claims, moments, read, table

K = "unroll_steps"
ARMS = "Adam", "SGD", "SGD-fast", "momentum", "SGD-fast-eps", "momentum-eps"
EARLY = """
No arm makes half of the digits yet: these are the first moments of a training, in which samples can
be all the same because G has hardly moved.
"""
DIVERSITY = {
    "variance": "variance",
    "classes_of_a_percent": "classes with 1 %",
    "class_entropy": "entropy",
}


def _printed(column: str) -> Callable[[Row], float]:
    """Return what gives a column as it is printed: two collapsed arms differ in the ninth digit."""
    return lambda row: round(float(row[column]), 3)


def gan_mnist(results: Path) -> str:
    """Return the section, or "" without a record."""
    rows = read(results / "gan_mnist.csv").pick(preset="small").most("pairs").rows
    every = Records(list({(r["optimizer"], r[K], r["seed"]): r for r in rows}.values()))
    if not every.rows:
        return ""
    first = every.rows[0]
    accuracy = f"{float(first['classifier_accuracy']):.1f}"
    cells = [
        (arm, k, every.pick(optimizer=arm, unroll_steps=k))
        for arm in ARMS
        for (k,) in every.pick(optimizer=arm).settings(K)
    ]
    run = {(name, k) for name, k, _ in cells}
    absent = [f"{name}, K = {k}" for name in ARMS for k in ("0", "5") if (name, k) not in run]
    missing = f" Not run: {'; '.join(absent)}." if absent else ""
    rates = {arm: f"{float(own.rows[0]['lr']):.2g}" for arm, _, own in cells}
    counts = sorted({len(own.rows) for _, _, own in cells})
    ahead = max((k for _, k, _ in cells if k != "0"), key=int, default="5")
    shapes = [
        (
            *(arm, k, str(len(own.rows)), brief(own.values("classes"), 1)),
            brief(own.values("classes_of_a_percent"), 1),
            brief(own.values("class_entropy"), 2),
            brief(own.values("variance"), 3),
            f"{1000 * moments(own.values('seconds_a_pair'))[0]:,.0f}",
            f"{moments(own.values('images_a_second'))[0]:,.0f}",
        )
        for arm, k, own in cells
    ]
    causes = [
        (
            *(arm, k),
            *(brief(own.values(f"mean_{name}"), 3) for name in ("d_gradient", "d_update")),
            *(brief(own.values(f"mean_d_on_{name}"), 2) for name in ("real", "fake", "pattern")),
            brief(own.values("taken_for_real"), 2),
            brief(own.values("mean_learned"), 3),
        )
        for arm, k, own in cells
    ]
    shape_head = ("optimizer", "K", "seeds", "classes", "classes with 1 %", "entropy")
    cause_head = ("optimizer", "K", "gradient", "update", "D(data)", "D(samples)", "D(pattern)")
    cause_head += ("taken for real", "learned")

    def arm(name: str, k: str | int = 0) -> dict[str, object]:
        return {"optimizer": name, K: k}

    def against_adam(column: str, text: str, *, larger: bool = True) -> list[Comparison]:
        """Compare SGD, at both rates, with Adam, without looking ahead."""
        found = []
        for name in ("SGD", "SGD-fast"):
            order = (arm("Adam"), arm(name)) if larger else (arm(name), arm("Adam"))
            names = ("Adam", name) if larger else (name, "Adam")
            found += every.compare(f"{text}, {names[0]} against {names[1]}", column, *order)
        return found

    def diversity(high: tuple[str, str | int], low: tuple[str, str | int]) -> list[Comparison]:
        names = [f"{name}, K={k}" for name, k in (high, low)]
        return [
            comparison
            for column, text in DIVERSITY.items()
            for comparison in every.compare(
                f"{text}, {names[0]} against {names[1]}", _printed(column), arm(*high), arm(*low)
            )
        ]

    most = max(every.values("classes_of_a_percent"))
    readme = "that README"
    return f"""## Adam against SGD on MNIST

`gan_mnist.py`: the perceptron GAN of the README of
[drawcodeboy/GAN](https://github.com/drawcodeboy/GAN), with its networks and settings: its code
returns D's loss first and unpacks G's first, so its loss curves are swapped; ours are not. With
plain SGD, it reports, all samples are the same; it explains this by D's weak gradients, with which
D does not learn that a pattern which it takes for real is not. Here the pattern is the sample
nearest to the mean of all: where all samples are the same, any.

Both networks have the same optimizer. "SGD" is that README's, at 2e-4, which hardly moves them in
so few pairs; "SGD-fast" is at a hundred times that rate, and "momentum" goes as far a pair with
momentum 0.9. Arms that end in "-eps" test another explanation: its generator has
`BatchNorm1d(n, 0.8)`, which sets eps to 0.8 where the code that it is taken from means a momentum.
With an eps far above the variance of what it gets, BatchNorm does not normalise, and what the noise
does to the samples fades from layer to layer: the pixels of an untrained G vary with the noise by
less than a twentieth of what they do with 1e-5, PyTorch's default, which those arms have.

Scaled down: {int(first["pairs"]):,} pairs of updates for 187,400, all else as there; learning rates
of {", ".join(f"{rate} ({name})" for name, rate in rates.items())}; seeds
of each cell: {"-".join(map(str, counts))}.{missing}
Of {int(first["samples"]):,} samples of G in evaluation mode, as there: classes through a
classifier with {accuracy} % test accuracy, which calls noise some digit, too; entropy of the
classes (2.30 at most); variance, summed over pixels, of the data's. Times are CPU times on a
machine that did other work beside, and images those of the data that a training goes through.
Again:
`python examples/gan_mnist.py --iterations {first["pairs"]} --evaluate-every
{first["evaluate_every"]} --seeds {counts[-1]} --record --figures`.

{table((*shape_head, "variance", "ms a pair", "images a second"), shapes)}
{EARLY if most < 5 else ""}
What D does, as means over all evaluations: the norms of its gradient and of its update (means over
pairs); its output on data, on samples and on the pattern; the share of evaluations at which the
pattern is taken for real (D above 0.5); and how far D's output on a pattern has fallen by the next
evaluation, {first["evaluate_every"]} pairs later ("learned").

{table(cause_head, causes)}

{claims((
    (readme, "with SGD the samples are all the same, with Adam they are not",
     against_adam("variance", "variance")),
    (readme, "with SGD fewer classes are generated",
     against_adam("classes_of_a_percent", "classes with 1 %")),
    (readme, "under SGD, D's gradients are weaker",
     against_adam("mean_d_gradient", "gradient")),
    (readme, "under SGD, D moves less at each update",
     against_adam("mean_d_update", "update")),
    (readme, "under SGD, D takes the pattern for real more often",
     against_adam("taken_for_real", "taken for real", larger=False)),
    (readme, "under Adam, D learns sooner that the pattern is not real",
     against_adam("mean_learned", "learned")),
    ("ours", "looking ahead spreads the samples of SGD at that README's rate",
     diversity(("SGD", ahead), ("SGD", 0))),
    ("ours", "looking ahead spreads the samples of SGD at a hundred times that rate",
     diversity(("SGD-fast", ahead), ("SGD-fast", 0))),
    ("ours", "looking ahead spreads those of SGD with momentum",
     diversity(("momentum", ahead), ("momentum", 0))),
    ("ours", "looking ahead spreads those of Adam", diversity(("Adam", ahead), ("Adam", 0))),
    ("ours", "momentum spreads those of SGD without looking ahead",
     diversity(("momentum", 0), ("SGD-fast", 0))),
    ("ours", "BatchNorm's usual eps spreads those of SGD without looking ahead",
     diversity(("SGD-fast-eps", 0), ("SGD-fast", 0))),
    ("ours", "with BatchNorm's usual eps, D's gradients are stronger under SGD, too",
     every.compare("gradient, SGD-fast-eps, K=0 against SGD-fast, K=0", "mean_d_gradient",
                   arm("SGD-fast-eps"), arm("SGD-fast"))),
    ("ours", "BatchNorm's usual eps spreads those of SGD with momentum, without looking ahead",
     diversity(("momentum-eps", 0), ("momentum", 0))),
    ("ours", "where SGD is not collapsed, looking ahead spreads the samples more",
     diversity(("SGD-fast-eps", ahead), ("SGD-fast-eps", 0))
     + diversity(("momentum-eps", ahead), ("momentum-eps", 0))),
))}

"Spreads" is more variance, classes and entropy, and no word on quality: what varies may be noise,
as the samples show.

![Samples over training](../figures/gan_mnist_samples.png)

*Samples over training, seed 0.*

![Losses](../figures/gan_mnist_losses.png)

*Losses, as means since the evaluation before: thin lines are seeds, thick ones their means.*

![Diversity](../figures/gan_mnist_sampling.png)

*Classes and variance over training.*

![What D does](../figures/gan_mnist_explanation.png)

*What D does over training.*
"""  # fmt: skip
