"""What importing the package costs, and what it shows."""

import subprocess
import sys

import unroll

PLAIN_CALL = """
import sys
import torch, torchopt
assert "torch._dynamo" not in sys.modules
import unroll
d = torch.nn.Linear(2, 1)
loss = unroll.UnrolledGeneratorLoss(d, torchopt.adam(1e-3), unroll_steps=2)
loss(torch.randn(4, 2, requires_grad=True), torch.randn(4, 2)).backward()
assert "torch._dynamo" not in sys.modules, "importing it takes as long as importing torch"
"""


def test_a_plain_call_imports_no_compiler() -> None:
    """Not at the import, and not at the first call either; ``torch.optim`` itself imports it."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN_CALL], check=True)


def test_the_package_shows_its_public_names() -> None:
    shown = {name for name in dir(unroll) if not name.startswith("_")}
    assert shown == set(unroll.__all__)
    assert unroll.__version__.count(".") == 2
    own = shown - {"Batch", "Discriminator"}  # names of types of others
    assert all(getattr(unroll, name).__module__.startswith("unroll._") for name in own)
