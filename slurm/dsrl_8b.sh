#!/usr/bin/env bash
#SBATCH --job-name=dsrl_8b
#SBATCH --nodes=1
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
# DSRL on Qwen3-8B, the paper's run on one node of 8 GPUs. From the repository:
#
#   sbatch slurm/dsrl_8b.sh
#   sbatch --array=1-3 slurm/dsrl_8b.sh                              three seeds
#   sbatch --nodes=2 slurm/dsrl_8b.sh                                two nodes: twice the data parallelism
#   CONFIG=configs/grpo_qwen3_8b.yaml sbatch slurm/dsrl_8b.sh        the GRPO baseline
#   CONFIG="configs/sizes/qwen3_8b.yaml configs/methods/rloo.yaml" sbatch slurm/dsrl_8b.sh   any other method
#
# It runs every step that is not done yet (see slurm/job.sh), saves its state 15 minutes before the time limit and at
# preemption, requeues itself and resumes, even during the evaluation. Set account and partition on the command line or
# with SBATCH_ACCOUNT and SBATCH_PARTITION.

DSRL_ROOT="${DSRL_ROOT:-$SLURM_SUBMIT_DIR}"                    # this repository
CONFIG="${CONFIG:-configs/dsrl_qwen3_8b.yaml}"                 # the run: one file, or several separated by spaces
# shellcheck disable=SC2086 # CONFIG is words
RUN_NAME="${RUN_NAME:-$(basename -a -s .yaml $CONFIG | paste -sd_)}" # its folder is $OUTPUT_DIR/$RUN_NAME
OUTPUT_DIR="${OUTPUT_DIR:-$DSRL_ROOT/runs}"                    # on a file system that all nodes share
MEGATRON_FOLDER="${MEGATRON_FOLDER-$OUTPUT_DIR/megatron}"      # converted models; empty: do not convert
OVERRIDES="${OVERRIDES:-}"                                     # more key.path=value, separated by spaces
BENCHMARKS="${BENCHMARKS-math500,amc23,aime24,aime25,minerva,olympiadbench}" # evaluated at the end; empty: none
SAMPLES="${SAMPLES-32}"                                        # responses per problem; empty: each benchmark's own
EVALUATION_OVERRIDES="${EVALUATION_OVERRIDES:-}"               # more key.path=value for the evaluation
VENV="${VENV-$DSRL_ROOT/.venv}"                                # Python environment; empty with a container
CONTAINER="${CONTAINER:-}"                                     # such as: apptainer exec --nv /images/dsrl.sif
MAX_ATTEMPTS="${MAX_ATTEMPTS:-20}"                             # starts of one job, including the first
POLICY="${POLICY:-}"                                           # model to evaluate; empty: the run's newest export
STEPS="${STEPS:-check_environment check_configuration fetch_inputs convert_checkpoint train evaluate report}" # see job.sh

# shellcheck source=slurm/job.sh
source "$DSRL_ROOT/slurm/job.sh"
