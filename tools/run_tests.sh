#!/usr/bin/env bash
# Set up the CPU environment where needed and run the tests. Arguments go to pytest:
#   bash tools/run_tests.sh                        all tests but the slow and GPU ones
#   bash tools/run_tests.sh tests/config -k load   some of them
#   bash tools/run_tests.sh -m slow                the slow ones
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/setup_cpu.sh" --dev
cd "$root"
# The CPU environment lacks SGLang's kernels for GPUs.
export CUDA_VISIBLE_DEVICES=''
# More threads than the tests have cores slow SGLang's decoding several times; tests are small anyway.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${DSRL_VENV:-$root/.venv}/bin/python" -m pytest --durations=10 "$@"
