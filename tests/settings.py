"""Where the tests run: ``UNROLL_TEST_DEVICE=cuda pytest`` runs them on a GPU."""

import os
from functools import partial

import torch

DEVICE = torch.device(os.environ.get("UNROLL_TEST_DEVICE", "cpu"))

randn = partial(torch.randn, device=DEVICE, dtype=torch.float64)
rand = partial(torch.rand, device=DEVICE, dtype=torch.float64)
