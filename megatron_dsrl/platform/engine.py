"""What differs between CPU and CUDA for an SGLang engine: server arguments, environment, memory, tensor sharing.

Nothing here imports SGLang except in the engine's own processes: importing it patches Transformers, which the
trainer must not inherit.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.multiprocessing

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.rollout import EngineConfig

ServerArguments = dict[str, str | int | float | bool]
"""SGLang `ServerArgs` fields by name."""


EXPECTED_WARNINGS = (
    "resource_tracker",  # "leaked semaphore": `EngineServer.stop` kills the engine, and the tracker then cleans up
    "Only CUDA",  # this one and the next: SGLang's import, about kernels that the model does not use
    "Triton is not supported",
    "Transformer Engine and Apex are not installed",  # imported by models that are not used
    "ORJSONResponse is deprecated",  # SGLang's use of FastAPI
)
"""Beginnings of warnings in an engine's log that say nothing to a user. Without commas and colons, which divide the
entries of PYTHONWARNINGS."""


def engine_server_arguments(config: EngineConfig, deterministic: bool) -> ServerArguments:
    """Server arguments that depend on the device. Called on the first rank of the engine's group.

    On CUDA that rank's current device is the engine's first one, and the engine takes the next ones upwards.

    Args:
        config: the engine section.
        deterministic: the same requests in the same message must give the same bits.

    Raises:
        UserError: `engine.max_total_tokens` is missing on CPU, where SGLang would take nearly all memory.
    """
    if torch.cuda.is_available():
        return _cuda_server_arguments(config) | ({"enable_deterministic_inference": True} if deterministic else {})
    # Without the prefix cache, what was sampled before has no part in what is computed. The rest is the batch's alone.
    return _cpu_server_arguments(config) | ({"disable_radix_cache": True} if deterministic else {})


def engine_environment(tensor_parallel_size: int) -> dict[str, str]:
    """Environment variables of the server process, beyond those that it inherits."""
    inherited_filters = [os.environ["PYTHONWARNINGS"]] if os.environ.get("PYTHONWARNINGS") else []
    warning_filters = {"PYTHONWARNINGS": ",".join([*inherited_filters, *map("ignore:{}".format, EXPECTED_WARNINGS)])}
    if torch.cuda.is_available():
        return warning_filters
    environment = warning_filters | {
        "SGLANG_USE_CPU_ENGINE": "1",
        # More threads than free cores make decoding several times slower: the operations are tiny.
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",  # compiling costs more than it gains at this size
    }
    if tensor_parallel_size > 1:
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = _cores_for_ranks(tensor_parallel_size)
    return environment


def can_release_engine_memory() -> bool:
    """Whether the engine can give its memory to the training step and take it back."""
    return torch.cuda.is_available()


def weight_broadcast_backend() -> Literal["nccl", "gloo"]:
    """What carries weights to servers on other devices."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def prepare_engine_process() -> None:
    """Run first in every process of an engine, before SGLang is imported."""
    if not torch.cuda.is_available():
        from megatron_dsrl.platform.sglang_cpu import absent_packages

        absent_packages.install()


def prepare_engine_launch() -> None:
    """Run in an engine's server process before it launches the others."""
    if not torch.cuda.is_available():
        from megatron_dsrl.platform.sglang_cpu import forked_processes

        forked_processes.register()


def run_scheduler_process(*args: Any, **kwargs: Any) -> Any:
    """SGLang's scheduler process, with this platform's attention backend, sampler and host memory."""
    from sglang.srt.managers.scheduler import run_scheduler_process as sglang_scheduler_process

    if not torch.cuda.is_available():
        from megatron_dsrl.platform.sglang_cpu import batched_attention, seeded_sampling, unpinned_memory

        batched_attention.register()
        seeded_sampling.register()
        unpinned_memory.register()
    return sglang_scheduler_process(*args, **kwargs)


def skip_warmup(server_arguments: Any) -> bool:
    """In the place of SGLang's warm-up requests, which say False when the server is not to go on to `/freeze_gc`.

    SGLang 0.5.23 posts that to itself right after the warm-up. Without one its port is not open yet, so that the call
    fails, garbage collection is not frozen, and the log shows a traceback. `EngineServer.wait_until_ready` makes the
    call when the port is open.
    """
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    get_global_state().tokenizer_manager.server_status = ServerStatus.Up
    return False


@contextmanager
def tensor_sharing() -> Iterator[None]:
    """Inside, pickled tensors can be opened by a process that is no child of this one.

    CPU tensors are shared through named files in memory: file descriptors, the default, need the receiver to hold
    this process's authentication key, and SGLang's scheduler dies on the refused connection. CUDA tensors are shared
    by CUDA IPC either way.

    torch starts a process that looks after these files, and SLURM signals it with all others of a job. It inherits that
    the signals to stop are blocked here; for this process they wait until the end of the block.
    """
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        torch.multiprocessing.set_sharing_strategy(before)


def _cuda_server_arguments(config: EngineConfig) -> ServerArguments:
    return {
        "base_gpu_id": torch.cuda.current_device(),
        "enable_memory_saver": True,
        "mem_fraction_static": config.memory_fraction,
    }


def _cpu_server_arguments(config: EngineConfig) -> ServerArguments:
    if config.max_total_tokens is None:
        raise UserError(
            "engine.max_total_tokens must be set on a machine without CUDA: it is the KV-cache capacity in tokens "
            "(for a tiny model 65536 is a good start)"
        )
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "sleep_on_idle": True,  # an idle scheduler would keep one core busy while the trainer works
    }


def _cores_for_ranks(ranks: int) -> str:
    """One core per engine rank, in SGLang's format `0|1`; cores are shared where there are fewer than ranks."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))

