"""The page of the experiments on CIFAR-10: docs/results/cifar10.md."""

from lab.pages import Section

INTRODUCTION = """# The experiments on CIFAR-10

Written by `python examples/tables.py` from the records beside this page.
"""
SECTIONS: list[Section] = []  # in the page's order; see lab/pages.py
