#!/usr/bin/env bash
#SBATCH --job-name=dsrl_convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# Only the conversion, on a node without GPUs: converts a configuration's model to a Megatron checkpoint in
# $MEGATRON_FOLDER, where the jobs that you submit afterwards find it.
#
#   CONFIG=configs/dsrl_qwen3_30b_a3b.yaml sbatch slurm/convert.sh

DSRL_ROOT="${DSRL_ROOT:-$SLURM_SUBMIT_DIR}"
STEPS="${STEPS:-check_environment convert_checkpoint}"

# shellcheck source=slurm/dsrl_8b.sh
source "$DSRL_ROOT/slurm/dsrl_8b.sh"
