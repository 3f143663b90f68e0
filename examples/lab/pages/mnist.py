"""The page of the experiments on MNIST: docs/results/mnist.md."""

from lab.pages.colored import colored_mnist
from lab.pages.gan_mnist import gan_mnist
from lab.pages.page import Section
from lab.pages.rnn import rnn_mnist
from lab.pages.stacked import stacked_mnist
from lab.pages.throughput import throughput

INTRODUCTION = """# The experiments on MNIST

Written by `python examples/tables.py` from the records beside this page. Means over seeds, ±
standard errors; claims are judged as on the page of [the toy experiments](toys.md): a comparison is
*for* its claim where the means differ in the claim's direction (Welch's t test, two-sided, 5 %),
and with fewer than three seeds a side there are too few to say. All runs are on a CPU, and shorter
or smaller than the originals; each section says how.
"""
SECTIONS: list[Section] = [
    rnn_mnist,
    stacked_mnist,
    colored_mnist,
    gan_mnist,
    throughput,
]  # in the page's order; see page.py
