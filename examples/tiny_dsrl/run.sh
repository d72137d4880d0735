#!/usr/bin/env bash
# From a fresh clone to a finished DSRL run with its report, on a CPU.
#
#   bash examples/tiny_dsrl/run.sh                     the run of configs/tiny_dsrl.yaml
#   DSRL_RUN_FOLDER=runs/seed2 bash examples/tiny_dsrl/run.sh seed=2     another run with overrides
#
# The run folder is runs/tiny_dsrl, or DSRL_RUN_FOLDER if you set it. An interrupted run resumes; a finished one is left
# as it is.
#
# 1. the environment (.venv; instant once it exists)    2. the tiny base model (cached; instant once it exists)
# 3. DSRL training with evaluation before and after     4. the HTML report
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
run_folder="${DSRL_RUN_FOLDER:-runs/tiny_dsrl}"
cd "$root"
bash tools/setup_cpu.sh
export PATH="${DSRL_VENV:-$root/.venv}/bin:$PATH"
# The CPU environment lacks SGLang's kernels for GPUs.
export CUDA_VISIBLE_DEVICES=''
# Many containers set this. Every process would compile all that it imports: seconds each time.
unset PYTHONDONTWRITEBYTECODE
# One thread, so that the figures of the tutorial can be repeated: the number of threads changes rounding.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "== base model"
torchrun --nproc-per-node 2 -m examples.tiny_dsrl.make_base
echo "== DSRL training"
dsrl train configs/tiny_dsrl.yaml "output_dir=$(dirname "$run_folder")" "name=$(basename "$run_folder")" "$@"
echo "== report"
dsrl report "$run_folder"
