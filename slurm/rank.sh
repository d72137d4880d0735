#!/usr/bin/env bash
# One process of `srun`, with the variables that torch.distributed needs. MASTER_ADDR and MASTER_PORT come from the job.
# (Used instead of torchrun, so that signals and exit statuses pass directly between SLURM and the training.)
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="$((SLURM_NTASKS / SLURM_NNODES))"
# Megatron's, for overlapping collectives with matrix products; the driver reads it when it starts. SGLang sets its own.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
exec "$@"
