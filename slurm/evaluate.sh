#!/usr/bin/env bash
#SBATCH --job-name=dsrl_evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# Only the evaluation, with one engine per GPU. It requeues itself three minutes before the time limit and at preemption,
# and resumes: finished samples are kept.
#
#   RUN_NAME=dsrl_qwen3_8b sbatch slurm/evaluate.sh                          the newest export of a run
#   POLICY=Qwen/Qwen3-8B RUN_NAME=base_8b sbatch slurm/evaluate.sh           another model, into $OUTPUT_DIR/base_8b
#   BENCHMARKS=gpqa_diamond,mmlu_pro SAMPLES= ... sbatch slurm/evaluate.sh   other benchmarks, with their default number of samples

DSRL_ROOT="${DSRL_ROOT:-$SLURM_SUBMIT_DIR}"
STEPS="${STEPS:-check_environment evaluate}"

# shellcheck source=slurm/dsrl_8b.sh
source "$DSRL_ROOT/slurm/dsrl_8b.sh"
