"""The sections on other settings of `mog_seeds.py`: sharper, fresh minibatches, real steps of D."""

from lab.pages.claims import Comparison, Records, claims, moments
from lab.pages.ring import (
    EVEN,
    MODES,
    ROTATIONS,
    SETTING,
    SHARP,
    Arm,
    K,
    better,
    goal,
    listed,
    runs,
)


def mog_sharp(records: Records) -> str:
    """Return the section on what it takes for sharp samples."""
    names = ("preset", "activation", "discriminator_layers", "generator_lr", "discriminator_lr")
    names += ("half_life", "batch_size", "pairs", K)
    setting, nearest = goal(records, *names)
    half_life = f" --half-life {setting['half_life']}" * (setting["half_life"] != "0")
    ks = [k for (k,) in records.pick(pairs=setting["pairs"]).settings(K)]
    arms: list[Arm] = [(f"K={k}", {K: k, "pairs": setting["pairs"]}) for k in (setting[K], ks[0])]
    return f"""## Sharp samples

`mog_seeds.py` with learning rates that are halved, smoothly, every so many pairs: with constant
ones the samples go on trembling about the modes. {nearest} Again:
`python examples/mog_seeds.py --preset {setting["preset"]} --activation {setting["activation"]}
--discriminator-layers {setting["discriminator_layers"]} --generator-lr {setting["generator_lr"]}
--discriminator-lr {setting["discriminator_lr"]}{half_life} --batch-size {setting["batch_size"]}
--iterations {setting["pairs"]} --unroll-steps {listed(records)}
--record docs/results/mog_sharp.csv --figures`.

{runs(records, *names)}

{claims((
    ("ours", "falling rates alone do not stop the rotation: looking ahead covers more modes",
     better(records, MODES, *arms)),
    ("ours", "and is sharper", better(records, SHARP, *arms)),
    ("ours", "and spreads more evenly", better(records, EVEN, *arms)),
    ("ours", "and rotates less", better(records, ROTATIONS, *arms)),
))}

![Samples over training](../figures/mog_seeds_quick_fig2_halved.png)

*Generated samples of seed 0 over training, the learning rates halved.*

![Metrics over training](../figures/mog_seeds_quick_fig2_halved_curves.png)

*Metrics over training: thin lines are seeds, thick ones their means.*
"""  # fmt: skip


def mog_resample(records: Records) -> str:
    """Return the section on fixed against re-sampled minibatches."""
    judged = records.most("pairs")
    first = judged.rows[0]

    def alike(metric: str) -> list[Comparison]:
        """Compare both, of which neither is to be better."""
        found = []
        for (k,) in judged.settings(K):
            fixed, fresh = (
                (f"K={k} {name}", {K: k, "resample": resample})
                for name, resample in (("fixed", False), ("fresh", True))
            )
            found += better(judged, metric, fixed, fresh, says="alike")
        return found

    return f"""## Fixed or fresh minibatches in the look-ahead

`mog_seeds.py --compare minibatches`: the paper keeps one minibatch in all K steps and says that
fresh ones did not significantly impact the result. {_short(judged)} Again:
`python examples/mog_seeds.py --compare minibatches --batch-size {first["batch_size"]}
--iterations {first["pairs"]} --unroll-steps {listed(judged)} --record --figures`.

{runs(records, *SETTING, "resample")}

{claims((
    ("paper", "no significant difference in the modes covered", alike(MODES)),
    ("paper", "nor in how evenly they are", alike(EVEN)),
    ("paper", "nor in sharpness", alike(SHARP)),
))}
"""  # fmt: skip


def mog_dsteps(records: Records) -> str:
    """Return the section on real steps of D in place of unrolled ones."""
    judged = records.most("pairs")
    first = judged.rows[0]
    ks = [k for (k,) in judged.settings(K) if k != "0"]

    def ahead(k: str) -> Arm:
        return f"K={k}", {K: k, "discriminator_steps": 1}

    def real(count: str) -> Arm:
        return f"{count} D steps", {K: 0, "discriminator_steps": count}

    def each(metric: str) -> list[Comparison]:
        return [c for k in ks for c in better(judged, metric, ahead(k), real(k))]

    def helps(metric: str) -> list[Comparison]:
        return [c for k in ks for c in better(judged, metric, real(k), real("1"))]

    return f"""## Real steps of D in place of unrolled ones

`mog_seeds.py --compare real-steps`: a D that is K real steps ahead before every step of a standard
G, against a G that looks K steps ahead. {_short(judged)} Again:
`python examples/mog_seeds.py --compare real-steps --batch-size {first["batch_size"]}
--iterations {first["pairs"]} --unroll-steps {" ".join(ks)} --record --figures`.

{runs(records, *SETTING, "discriminator_steps")}

{claims((
    ("paper", "K real steps are no substitute: K unrolled ones cover more modes", each(MODES)),
    ("paper", "and spread more evenly", each(EVEN)),
    ("paper", "and rotate less", each(ROTATIONS)),
    ("ours", "real steps help at all: more modes than the standard GAN", helps(MODES)),
))}
"""  # fmt: skip


def _short(records: Records) -> str:
    """Return what was scaled down, and how far the samples come."""
    first = records.rows[0]
    arms = records.settings(K, "resample", "discriminator_steps")
    best = max(
        moments(records.pick(**{K: k, "resample": r, "discriminator_steps": d}).values(SHARP))[0]
        for k, r, d in arms
    )
    blurred = ": spread, not yet sharp, and modes are hit nearly by chance" * (best < 2)
    return (
        f"Scaled down: preset `{first['preset']}` (`mog.py --help`), batches of "
        f"{first['batch_size']}; claims are judged at {int(first['pairs']):,} pairs. The samples "
        f"of the best arm are then {best:.1f} % high quality{blurred}."
    )
