#!/usr/bin/env bash
#SBATCH --job-name=tiny_dsrl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# The tiny run of examples/tiny_dsrl on CPU nodes, to try out a cluster: `sbatch slurm/tiny_cpu.sh`, or one run per seed,
# `sbatch --array=1-3 slurm/tiny_cpu.sh`. Only the configuration differs from dsrl_8b.sh. First run
# `bash examples/tiny_dsrl/run.sh` once, which makes the environment and the base model.

DSRL_ROOT="${DSRL_ROOT:-$SLURM_SUBMIT_DIR}"
CONFIG="${CONFIG:-configs/tiny_dsrl.yaml}"
BENCHMARKS="${BENCHMARKS-}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# shellcheck source=slurm/dsrl_8b.sh
source "$DSRL_ROOT/slurm/dsrl_8b.sh"
