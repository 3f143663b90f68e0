#!/usr/bin/env bash
# The core on a GPU: its tests in float64, and a small benchmark; under eight minutes.
# bash tests/on_gpu.sh [cuda:1]        writes what it shows to on_gpu.txt
set -euo pipefail
cd "$(dirname "$0")/.."
device="${1:-cuda}"
core=(tests/test_{closed_forms,gradients,loss,plain_call,optimizers,state,nan,checkpoint,autocast}.py)
{
  python -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
  UNROLL_TEST_DEVICE="$device" timeout 300 python -m pytest -q -n auto --dist loadfile "${core[@]}" \
    || echo "the tests failed, or took more than five minutes"
  timeout 180 python -m tests.benchmarks --device "$device" --quick --without "JAX, optax"
} 2>&1 | tee on_gpu.txt
