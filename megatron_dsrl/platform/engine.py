"""SGLang engine settings that differ between CPU and CUDA: server arguments, environment, memory, tensor sharing.

Only engine processes import SGLang: importing it patches Transformers, which must not happen in the trainer.
"""

import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.multiprocessing

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.engine_numerics import SPECULATION
from megatron_dsrl.config.rollout import EngineConfig

LOOPBACK = "127.0.0.1"

ServerArguments = dict[str, str | int | float | bool]
"""SGLang `ServerArgs` fields by name."""

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Settings of PyTorch's allocator; the second is the older name, which PyTorch 2.14 still reads."""

CACHE_VARIABLE = "SGLANG_CACHE_DIR"
EXTERNAL_MODELS = "SGLANG_EXTERNAL_MODEL_PACKAGE"

EXPECTED_WARNINGS = (
    "resource_tracker",  # "leaked semaphore": `EngineServer.stop` kills the engine, and the tracker cleans up
    "Only CUDA",  # this one and the next: from importing SGLang, about kernels that the model does not use
    "Triton is not supported",
    "Transformer Engine and Apex are not installed",  # imported by models that are not used
    "ORJSONResponse is deprecated",  # SGLang's use of FastAPI
)
"""Prefixes of irrelevant warnings in an engine's log. They must not contain commas or colons, the separators of
PYTHONWARNINGS."""


def engine_server_arguments(config: EngineConfig, deterministic: bool) -> ServerArguments:
    """Device-dependent server arguments. Call it on the first rank of the engine's group: on CUDA the engine uses
    consecutive devices, starting with that rank's. `deterministic`: the same requests in the same message must give
    bitwise identical results.

    Raises UserError on CPU if `engine.max_total_tokens` is missing, without which SGLang would take nearly all memory,
    or if `engine.quantization` or speculative decoding is set.
    """
    if torch.cuda.is_available():
        return _cuda_server_arguments(config) | ({"enable_deterministic_inference": True} if deterministic else {})
    # Without the prefix cache, results depend only on the batch and not on earlier requests.
    return _cpu_server_arguments(config) | ({"disable_radix_cache": True} if deterministic else {})


def engine_environment(tensor_parallel_size: int, cpu_threads: int = 1) -> dict[str, str]:
    """Environment variables of the server process, in addition to those it inherits. `cpu_threads` are those of each of
    its processes that compute; see `common/cpu_threads.py`."""
    inherited_filters = [os.environ["PYTHONWARNINGS"]] if os.environ.get("PYTHONWARNINGS") else []
    warning_filters = {"PYTHONWARNINGS": ",".join([*inherited_filters, *map("ignore:{}".format, EXPECTED_WARNINGS)])}
    common = warning_filters | _cache_folder(os.environ)
    if torch.cuda.is_available():
        return common
    environment = common | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": str(cpu_threads),
        "TORCH_COMPILE_DISABLE": "1",  # compiling does not pay off for small models
        # SGLang imports its own 250 models first, unless it finds the model in such a package.
        EXTERNAL_MODELS: os.environ.get(EXTERNAL_MODELS, "megatron_dsrl.platform.engine_models"),
    }
    if tensor_parallel_size > 1:
        # One core per rank, in SGLang's format `0|1`; ranks share cores if there are too few.
        cores = sorted(os.sched_getaffinity(0))
        shared_out = (str(cores[rank % len(cores)]) for rank in range(tensor_parallel_size))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(shared_out)
    return environment


def _cache_folder(variables: Mapping[str, str]) -> dict[str, str]:
    """A folder for what SGLang compiles, if its default, the user's home, is not writable, as in some containers."""
    if CACHE_VARIABLE in variables or _can_write(Path(os.path.expanduser("~/.cache/sglang"))):
        return {}
    return {CACHE_VARIABLE: str(Path(tempfile.gettempdir(), f"sglang_{os.getuid()}"))}


def _can_write(folder: Path) -> bool:
    """Whether a folder, which is created if it does not exist, can be written to."""
    if not folder.is_absolute():  # the home is unknown
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def can_release_engine_memory() -> bool:
    """Whether the engine can release its memory for the training step and restore it."""
    return torch.cuda.is_available()


def allocator_warning(variables: Mapping[str, str] = os.environ) -> str | None:
    """A warning if PyTorch's allocator settings conflict with engines on the trainer's GPUs.

    torch_memory_saver 0.0.10 cannot release memory of expandable segments and ends the engine, so engines do not
    inherit the setting (`server_process.inherited_environment`). The trainer keeps it. PyTorch 2.14 then shares
    memory with another process by `pidfd_getfd`, which needs the right to trace that process.
    """
    names = [name for name in ALLOCATOR_VARIABLES if _expands_segments(variables.get(name, ""))]
    if not names or not torch.cuda.is_available():
        return None
    return (
        f"warning: {names[0]} sets expandable_segments:True. It applies to the trainer only: torch_memory_saver could "
        "not release the memory of an engine that has it. The trainer then needs pidfd_getfd to share weights with "
        "the engine, which many containers forbid: if the first weight push fails, unset it"
    )


def _expands_segments(settings: str) -> bool:
    pairs = [pair.partition(":") for pair in settings.split(",")]
    return any(key.strip() == "expandable_segments" and value.strip().lower() == "true" for key, _, value in pairs)


def weights_through_shared_memory() -> bool:
    """Whether weights go to the engines through files in /dev/shm."""
    return not torch.cuda.is_available()


def compiles_kernels() -> bool:
    """Whether a started engine compiles kernels during its first requests, which takes up to minutes."""
    return torch.cuda.is_available()


def feed_forward_multiple() -> int:
    """Multiple to which SGLang pads the inner sizes of feed-forward layers and experts on every rank of an engine.

    Source: `adjust_config_with_unaligned_cpu_tp` in sglang/srt/configs/update_config.py.
    """
    return 1 if torch.cuda.is_available() else 32


def weight_broadcast_backend() -> Literal["nccl", "gloo"]:
    """Backend for broadcasting weights to servers on other devices."""
    return "nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def tensor_sharing() -> Iterator[None]:
    """Within the block, pickled tensors can be opened by a process that is not a child of this one.

    CPU tensors are shared through named files in memory. With file descriptors, the default, the receiver needs this
    process's authentication key, and SGLang's scheduler dies when the connection is refused. CUDA tensors are always
    shared by CUDA IPC.

    torch starts a helper process that manages these files, and SLURM signals all processes of a job. Stop signals are
    blocked here so that the helper inherits the mask; this process receives them at the end of the block.
    """
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        torch.multiprocessing.set_sharing_strategy(before)


def _cuda_server_arguments(config: EngineConfig) -> ServerArguments:
    return {
        "base_gpu_id": torch.cuda.current_device(),
        "enable_memory_saver": True,
        # Graphs for prefill (SGLang's default, "breakable") would keep their memory while the engine is released.
        "cuda_graph_backend_prefill": "disabled",
        "mem_fraction_static": config.memory_fraction,
    }


def _cpu_server_arguments(config: EngineConfig) -> ServerArguments:
    if config.quantization is not None:
        raise UserError(
            f"engine.quantization={config.quantization} needs an NVIDIA GPU: SGLang has no FP8 kernels for this CPU; "
            "set it to null"
        )
    if SPECULATION in config.extra_arguments:
        raise UserError(
            f"engine.extra_arguments.{SPECULATION} needs an NVIDIA GPU: SGLang's CPU path moves its cache with kernels "
            "that are missing here (sgl_kernel); leave it out"
        )
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
        "sleep_on_idle": True,  # otherwise an idle scheduler keeps a core busy while the trainer works
    }
