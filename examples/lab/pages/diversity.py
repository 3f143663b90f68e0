"""The sections on Section 3.4.1 and 3.4.2: reconstructions and distances."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from lab.pages.cifar10 import K, early, largest, scale
from lab.pages.claims import (
    Claim,
    Comparison,
    Count,
    Records,
    claims,
    moments,
    read,
    shown,
    table,
    wrapped,
)

Errors = Mapping[tuple[str, str], Mapping[str, float]]  # by K and seed, and by image
PUBLISHED = {"reconstruction_mse": 4, "percent_best_rank": 2}


def inversion(results: Path) -> str:
    """Return the section on Table 3, Fig. 5 and Appendix G."""
    own = largest(read(results / "cifar10_inversion.csv"), "targets", "starts", "steps")
    own = _balanced(own)
    if not own.rows:
        return ""
    first, ks = own.rows[0], [k for (k,) in own.settings(K)]
    errors = {
        (k, s): {row["image"]: float(row["mse"]) for row in own.pick(**{K: k, "seed": s}).rows}
        for k, s in own.settings(K, "seed")
    }
    seeds = sorted({s for _, s in errors}, key=int)
    means = {k: [moments([*errors[k, s].values()])[0] for s in seeds] for k in ks}
    best = {k: [_best(errors, ks, k, s) for s in seeds] for k in ks}
    published = _published(results / "published.csv")
    lines = [
        (
            k,
            shown(means[k], 4),
            shown([mse / 4 for mse in means[k]], 4),
            shown(best[k], 1),
            *(published.get((k, name), "") for name in ("reconstruction_mse", "percent_best_rank")),
        )
        for k in ks
    ]
    head = ("K", "MSE", "MSE in [0, 1]", "% best", "MSE, paper", "% best, paper")
    text = f"""`cifar10_diversity.py`: for {first["targets"]} training images (the paper: 1,280),
        the latent point whose image is nearest, by L-BFGS from {first["starts"]} random starts, at
        most {first["steps"]} steps each (the paper does not say), with a line search and a history
        of its own for every start; the best start counts. Images and starts are the same for every
        model, G is in evaluation mode. MSE is the mean over pixels and channels in [-1, 1] (the
        paper's scale is not said), its mean over the images of each model, ± standard errors over
        {len(seeds)} seeds. "% best" (the paper's "best rank") is the share of images that this K
        reconstructs best among the models of a seed. {scale(own)}"""
    pages = "\n\n".join(
        f"![Reconstructions, seed {s}](../figures/cifar10_reconstructions_seed{s}.png)"
        for s in seeds
    )
    return f"""## Table 3: inference by optimisation

{wrapped(text)} Again:
`{_command(results)}`
after the training above.

{table(head, lines)}

{claims(_reconstruction_claims(errors, means, seeds), early=early(own))}

Paired comparisons are over the images of one seed's models (a t test, 5 %); comparisons of means
are over seeds.

{pages}

*Fig. 5 and Appendix G's pages: of each seed, the images whose errors at the fewest and the most
steps differ most, as a fraction of the latter; errors below.*
"""


def distances(results: Path) -> str:
    """Return the section on Fig. 6."""
    own = _balanced(largest(read(results / "cifar10_distances.csv"), "samples", "distances"))
    if not own.rows:
        return ""
    first, ks = own.rows[0], [k for (k,) in own.settings(K)]
    floor = f"{float(first['wasserstein_data']):.2f}"
    lines: list[tuple[str, ...]] = [("data", "", f"{float(first['median_data']):.2f}", floor)]
    for k in ks:
        seeds = own.pick(**{K: k})
        cells = [shown(seeds.values(name), 2) for name in ("median", "wasserstein")]
        lines.append((k, str(len(seeds.rows)), *cells))
    head = ("K", "seeds", "median distance", "Wasserstein-1 to the data's distances")
    text = f"""`cifar10_diversity.py`: l2 distances, pixels in [-1, 1], of
        {int(first["distances"]):,} random pairs of different samples, of {int(first["samples"]):,}
        samples of each model, and of as many pairs of training images. The line of the data has the
        Wasserstein-1 distance between two draws of pairs: what a perfect model would have.
        {scale(own)}"""
    zero = own.pick(**{K: 0}).rows
    judged = [
        (
            "paper",
            "without unrolling, distances are smaller than in the data",
            [
                Comparison(
                    "median, data against K=0",
                    [float(row["median_data"]) for row in zero],
                    [float(row["median"]) for row in zero],
                )
            ]
            if zero
            else [],
        ),
        (
            "paper",
            "more steps are more like the data",
            [
                comparison
                for low, high in pairwise(ks)
                for comparison in own.compare(
                    f"Wasserstein-1, K={low} against K={high}", "wasserstein", {K: low}, {K: high}
                )
            ],
        ),
        (
            "ours",
            "the most steps are more like the data than none",
            own.compare(
                f"Wasserstein-1, K=0 against K={ks[-1]}", "wasserstein", {K: 0}, {K: ks[-1]}
            )
            if ks[-1] != "0"
            else [],
        ),
    ]
    return f"""## Fig. 6: distances of random pairs

{wrapped(text)} Again:
`{_command(results)}`
after the training above.

{table(head, lines)}

{claims(judged, early=early(own))}

![Distances](../figures/cifar10_distances.png)

*Distances of random pairs: the data in red, a blue line a seed, medians dashed.*
"""


def _command(results: Path) -> str:
    """Return how both records are made again: by one command."""
    flags = []
    for record, names in (
        ("inversion", ("targets", "starts", "steps")),
        ("distances", ("samples", "distances")),
    ):
        rows = largest(read(results / f"cifar10_{record}.csv"), *names).rows
        flags += [f"--{name} {rows[0][name]}" for name in names if rows]
    return f"python examples/cifar10_diversity.py {' '.join(flags)} --record --figures"


def _balanced(own: Records) -> Records:
    """Return the seeds that every K has, so that models are compared seed by seed."""
    ks = [k for (k,) in own.settings(K)]
    found = [{s for (s,) in own.pick(**{K: k}).settings("seed")} for k in ks]
    shared = set.intersection(*found) if found else set()
    return Records([row for row in own.rows if row["seed"] in shared])


def _best(errors: Errors, ks: Sequence[str], k: str, seed: str) -> float:
    """Return the percentage of images that one K reconstructs best."""
    images = errors[k, seed]
    wins = [min(ks, key=lambda other: errors[other, seed][image]) == k for image in images]
    return 100 * sum(wins) / len(wins)


def _published(path: Path) -> dict[tuple[str, str], str]:
    """Return the paper's Table 3."""
    found = {}
    for row in read(path).rows:
        if row["experiment"] == "cifar10":
            error = f" ± {row['error']}" if row["error"] else ""
            found[row[K], row["metric"]] = f"{row['value']}{error}"
    return found


def _reconstruction_claims(
    errors: Errors, means: Mapping[str, Sequence[float]], seeds: Sequence[str]
) -> list[Claim]:
    """Return the comparisons of every K with K=0: over images for each seed, and over seeds."""
    judged = []
    for k in means:
        if k == "0" or "0" not in means:
            continue
        paired = []
        for seed in seeds:
            low, high = errors["0", seed], errors[k, seed]
            gains = [low[image] - high[image] for image in low]
            paired.append(Comparison("", gains, [0.0] * len(gains)).finding)
        tried = f"seeds whose K={k} reconstructs better, paired over {len(low)} images"
        worse = f" ({paired.count('the reverse')} worse)"
        better = Count(tried + worse, [found == "for" for found in paired], every=True)
        over = Comparison(f"MSE over seeds, K=0 against K={k}", means["0"], means[k])
        claim = f"{k} step{'s' * (k != '1')} reconstruct{'s' * (k == '1')} better than none"
        judged.append(("paper", f"{claim}, paired over images", [better]))
        judged.append(("paper", f"{claim}, means over seeds", [over]))
    return judged
