"""The page of the experiments on CIFAR-10: docs/results/cifar10.md."""

from lab.pages import cifar10, diversity, evaluate, rsgan
from lab.pages.page import Section

INTRODUCTION = """# The experiments on CIFAR-10

Written by `python examples/tables.py` from the records beside this page. Means over seeds, ±
standard errors; claims are judged as on the [page of the toys](toys.md): a comparison is *for* its
claim where two means differ in its direction (Welch's t test, two-sided, 5 %), and fewer than three
seeds are too few to say. All runs are on one core of a CPU; seconds are CPU time.
"""
SECTIONS: list[Section] = [  # in the page's order; see page.py
    cifar10.training,
    diversity.inversion,
    diversity.distances,
    evaluate.evaluate,
    rsgan.rsgan,
]
