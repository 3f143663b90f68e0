"""The sections on the controls of `mog_seeds.py`: fresh minibatches, and real steps of D."""

from collections.abc import Mapping

from lab.claims import Comparison, Records, claims
from lab.ring_page import EVEN, MODES, ROTATIONS, SETTING, SHARP, Arm, better, listed, runs


def mog_resample(records: Records) -> str:
    """Return the section on fixed against re-sampled minibatches."""
    first = records.rows[0]

    def alike(metric: str) -> list[Comparison]:
        """Deny that either is better than the other."""
        found = []
        for (k,) in records.settings("unroll_steps"):
            fixed, fresh = (
                (f"K={k} {name}", {"unroll_steps": k, "resample": resample})
                for name, resample in (("fixed", False), ("fresh", True))
            )
            found += better(records, metric, fixed, fresh, denied=True)
            found += better(records, metric, fresh, fixed, denied=True)
        return found

    return f"""## Fixed or fresh minibatches in the look-ahead

`mog_seeds.py --compare minibatches`: the paper keeps one minibatch in all K steps and says that
fresh ones did not significantly impact the result. {_short(first)} Again:
`python examples/mog_seeds.py --compare minibatches --batch-size {first["batch_size"]}
--iterations {first["pairs"]} --unroll-steps {listed(records)} --record --figures`.

{runs(records, *SETTING, "resample")}

{claims((
    ("paper", "no significant difference in the modes covered", alike(MODES)),
    ("paper", "nor in how evenly they are", alike(EVEN)),
    ("paper", "nor in sharpness", alike(SHARP)),
))}
"""  # fmt: skip


def mog_dsteps(records: Records) -> str:
    """Return the section on real steps of D in place of unrolled ones."""
    first = records.rows[0]
    ks = [k for (k,) in records.settings("unroll_steps") if k != "0"]

    def ahead(k: str) -> Arm:
        return f"K={k}", {"unroll_steps": k, "discriminator_steps": 1}

    def real(count: str) -> Arm:
        return f"{count} D steps", {"unroll_steps": 0, "discriminator_steps": count}

    def each(metric: str) -> list[Comparison]:
        return [c for k in ks for c in better(records, metric, ahead(k), real(k))]

    def helps(metric: str) -> list[Comparison]:
        return [c for k in ks for c in better(records, metric, real(k), real("1"))]

    return f"""## Real steps of D in place of unrolled ones

`mog_seeds.py --compare real-steps`: a D that is K real steps ahead before every step of a standard
G, against a G that looks K steps ahead. {_short(first)} Again:
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


def _short(first: Mapping[str, str]) -> str:
    return (
        f"Scaled down: preset `{first['preset']}` (`mog.py --help`), batches of "
        f"{first['batch_size']}, {int(first['pairs']):,} pairs."
    )
