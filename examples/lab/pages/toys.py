"""The page of the toy experiments: each published claim beside what the records say.

Every number and verdict follows from the records by the rule that the page states.
"""

from collections.abc import Callable, Mapping

from lab.pages.claims import Records, read
from lab.pages.controls import mog_dsteps, mog_resample, mog_sharp
from lab.pages.history import mog_history
from lab.pages.nonuniform import mog_nonuniform
from lab.pages.ring import mog_seeds
from lab.pages.rivals import mog_rivals
from lab.pages.rsgan_toys import five_gaussians, two_clusters
from lab.pages.second_gradient import mog_second_gradient
from lab.records import RESULTS

INTRODUCTION = """# The toy experiments

Written by `python examples/tables.py` from the records beside this page. Means over seeds, ±
standard errors. A claim is one or more comparisons of two settings over seeds. A comparison is
*for* its claim where the means differ in the claim's direction (Welch's t test, two-sided, 5 %),
*the reverse* where they differ in the other one, else *no difference*. The claim **holds** where
all comparisons are for it and **partly** where some are; it is **not seen** where all say "no
difference" (with few seeds, small differences go unseen), else it **does not hold**. A claim that
something makes no difference, or does not help, is **not contradicted** where no comparison is
against it. Where a claim is that
something happens, or always does, seeds are counted: *some* and *none* are the seeds that do it.

Nothing is corrected for the number of comparisons. All runs are on a CPU, and shorter or smaller
than the originals; each section says how. Seconds are for all seeds of a setting, which train side
by side as one network of independent ones: CPU time, but for the revisions before 4bfa66d the
clock's, on a machine that did other work beside.

Tables, claims and verdicts follow from the records alone. Figures show samples and time series,
which the repository does not keep: the command of a section draws them again, with `--resume` from
its checkpoints.
"""


SECTIONS: Mapping[str, Callable[[Records], str]] = {
    "mog_seeds": mog_seeds,
    "mog_sharp": mog_sharp,
    "mog_resample": mog_resample,
    "mog_dsteps": mog_dsteps,
    "mog_history": mog_history,
    "mog_second_gradient": mog_second_gradient,
    "mog_nonuniform": mog_nonuniform,
    "two_clusters": two_clusters,
    "five_gaussians": five_gaussians,
    "mog_rivals": mog_rivals,
}


def page() -> str:
    """Return the page: a section for each experiment that has records."""
    sections = [INTRODUCTION]
    for name, section in SECTIONS.items():
        records = read(RESULTS / f"{name}.csv")
        if records.rows:
            sections.append(section(records))
    return "\n".join(sections)
