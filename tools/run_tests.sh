#!/usr/bin/env bash
# Set up the CPU environment if necessary and run the tests. Arguments go to pytest:
#   bash tools/run_tests.sh                        all tests except slow and GPU ones, with up to 4 workers
#   bash tools/run_tests.sh tests/config -k load   a selection, on one core (-n 2: on two)
#   bash tools/run_tests.sh -m slow                only the slow ones
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/setup_cpu.sh" --dev
cd "$root"
# The CPU environment lacks SGLang's kernels for GPUs.
export CUDA_VISIBLE_DEVICES=''
# Many containers set this. Every process would compile all that it imports: seconds each time.
unset PYTHONDONTWRITEBYTECODE
# Tests compare runs bit for bit, and the number of threads changes rounding.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [[ $# -eq 0 ]]; then
    # One worker more than cores, because tests often wait for engines, and 4 GiB for each.
    workers=$(awk '/^MemAvailable/ { print int($2 / 2^22) }' /proc/meminfo)
    for limit in 4 $(($(getconf _NPROCESSORS_ONLN) + 1)); do
        workers=$((workers < limit ? workers : limit))
    done
    set -- -n "$((workers > 1 ? workers : 1))"
fi
exec "${DSRL_VENV:-$root/.venv}/bin/python" -m pytest --durations=10 "$@"
