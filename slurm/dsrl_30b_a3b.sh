#!/usr/bin/env bash
#SBATCH --job-name=dsrl_30b_a3b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# DSRL on the mixture of experts Qwen3-30B-A3B, on two nodes: `sbatch slurm/dsrl_30b_a3b.sh`. Only the
# configuration differs from dsrl_8b.sh.

DSRL_ROOT="${DSRL_ROOT:-$SLURM_SUBMIT_DIR}"
CONFIG="${CONFIG:-configs/dsrl_qwen3_30b_a3b.yaml}"

# shellcheck source=slurm/dsrl_8b.sh
source "$DSRL_ROOT/slurm/dsrl_8b.sh"
