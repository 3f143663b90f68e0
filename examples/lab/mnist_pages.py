"""The page of the experiments on MNIST: docs/results/mnist.md."""

from lab.pages import Section

INTRODUCTION = """# The experiments on MNIST

Written by `python examples/tables.py` from the records beside this page.
"""
SECTIONS: list[Section] = []  # in the page's order; see lab/pages.py
