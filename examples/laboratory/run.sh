#!/usr/bin/env bash
#SBATCH --job-name=dsrl_laboratory
#SBATCH --cpus-per-task=1
#SBATCH --time=12:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.log
#
# The whole laboratory: base models, sweeps, and the page. Many hours on one core; run it again after an interruption,
# and it continues.
#
#   bash examples/laboratory/run.sh                              everything
#   bash examples/laboratory/run.sh bases                        only the base models
#   bash examples/laboratory/run.sh comparison map               only some sweeps
#   PART=2/8 bash examples/laboratory/run.sh comparison          the part of one of eight machines
#   sbatch --array=1-8 examples/laboratory/run.sh comparison     the same as a SLURM array, once the bases are made
set -euo pipefail

root="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}"
cd "$root"
here=examples/laboratory
part="${PART:-${SLURM_ARRAY_TASK_ID:-1}/${SLURM_ARRAY_TASK_COUNT:-1}}"
bash tools/setup_cpu.sh
export PATH="${DSRL_VENV:-$root/.venv}/bin:$PATH"
export CUDA_VISIBLE_DEVICES='' # the CPU environment lacks SGLang's kernels for GPUs
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE # with it, every process would compile all that it imports
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(bases learning_rate comparison warmup_lengths map remedies)

make_base() {
    local folder=".cache/laboratory/$1"
    python -m examples.laboratory.make_base "$1"
    [ ! -e "$folder/measured" ] || return 0
    dsrl eval "$folder/base" --benchmarks "$here/held_out.yaml" --data-folder "$folder" --output "$folder/evaluation" \
        engine.max_total_tokens=32768 model.dtype=float32
    dsrl analyse gradients "$folder/evaluation/samples/held_out.jsonl" --model "$folder/base" \
        --output "$folder/evaluation" model.dtype=float32 temperature=1.0 > "$folder/gradients.log"
    python -m examples.laboratory.base_properties "$1" && touch "$folder/measured"
}

for step in "${steps[@]}"; do
    if [ "$step" = bases ]; then
        for base in paper_like hidden restated restated_hidden; do make_base "$base"; done
    else
        dsrl sweep "$here/$step.yaml" --part "$part"
        python -m examples.laboratory.collect "$here/$step.yaml"
    fi
done
python -m examples.laboratory.page
