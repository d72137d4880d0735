"""Process groups: torch.distributed, Megatron's parallel state, and their random seeds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_dsrl.common.collective import join_processes
from megatron_dsrl.common.process import launched_world_size
from megatron_dsrl.config.layout import process_problems, refuse
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.platform import current_platform


def initialize_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Initialise torch.distributed (unless it already is) and Megatron's groups, and seed the random generators.

    Under torchrun the rendezvous comes from the environment; otherwise the world is this single process. Raises
    UserError if the layout does not match the number of processes; see `config.layout.process_problems`.
    """
    platform = current_platform()
    world_size = dist.get_world_size() if dist.is_initialized() else launched_world_size()
    refuse(process_problems(parallel, world_size))
    platform.install()
    virtual_stages = parallel.virtual_pipeline_stages
    if not dist.is_initialized():
        timeout = timedelta(seconds=parallel.collective_timeout_seconds)
        if "RANK" in os.environ:
            join_processes(platform.distributed_backend, timeout)
        else:
            # An in-process store needs no port, so any number of single-process runs can share a machine.
            store = dist.HashStore()
            dist.init_process_group(platform.distributed_backend, store=store, rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.split_of_experts,
        distributed_timeout_minutes=parallel.distributed_timeout_seconds / 60,
    )
    # As in Megatron's training, seeds differ between pipeline stages and are equal across data-parallel replicas.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def destroy_model_parallel() -> None:
    """Undo Megatron's part of `initialize_parallel`, so that the same processes can initialise another layout.

    Megatron forgets its groups and leaves them to torch.distributed, which keeps their connections and threads: more
    than 60 threads per layout on CPU; a third of them wake up a hundred times a second.
    """
    for group in parallel_state._global_process_group_list or ():
        if group is not None:
            dist.destroy_process_group(group)
    _forget_model_parallel()


def destroy_parallel() -> None:
    """Undo `initialize_parallel`, including torch.distributed. Does nothing if nothing is initialised."""
    _forget_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _forget_model_parallel() -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()


@contextmanager
def parallel_layout(parallel: ParallelConfig, seed: int) -> Iterator[None]:
    """Use a layout during a `with` block. torch.distributed stays initialised, so another layout can follow."""
    initialize_parallel(parallel, seed)
    try:
        yield
    finally:
        destroy_model_parallel()


SAMPLING_LIMIT = timedelta(days=14)
"""Limit for waiting on rank 0, which may sample for a long time."""


@contextmanager
def process_group() -> Iterator[None]:
    """Select each process's device and, with several processes, join a gloo group until the end of the block."""
    several = launched_world_size() > 1 and not dist.is_initialized()
    if several:
        join_processes("gloo", SAMPLING_LIMIT)
    if current_platform().name == "cuda":
        current_platform().install()
    try:
        yield
    finally:
        if several:
            dist.destroy_process_group()
