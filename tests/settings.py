"""Where the tests run: ``UNROLL_TEST_DEVICE=cuda pytest`` runs them on a GPU."""

import os
from functools import partial

import pytest
import torch

DEVICE = torch.device(os.environ.get("UNROLL_TEST_DEVICE", "cpu"))

randn = partial(torch.randn, device=DEVICE, dtype=torch.float64)
rand = partial(torch.rand, device=DEVICE, dtype=torch.float64)

OLDEST = torch.__version__.startswith("2.7.")
not_on_the_oldest = pytest.mark.skipif(OLDEST, reason="torch 2.7 cannot take such a step itself")
