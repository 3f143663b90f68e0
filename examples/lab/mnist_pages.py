"""The page of the experiments on MNIST: docs/results/mnist.md."""

from lab.pages import Section
from lab.rnn_page import rnn_mnist

INTRODUCTION = """# The experiments on MNIST

Written by `python examples/tables.py` from the records beside this page.
"""
SECTIONS: list[Section] = [
    rnn_mnist,
]  # in the page's order; see lab/pages.py
