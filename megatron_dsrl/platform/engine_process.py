"""What an engine's own processes do differently on each platform; see `rollout/engines/server_main.py`."""

import multiprocessing
import os
import socket
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import torch
import torch.distributed

from megatron_dsrl.common.process import die_with_parent
from megatron_dsrl.platform.cpu import disable_compilation
from megatron_dsrl.platform.engine import LOOPBACK


def prepare_engine_process() -> None:
    """Run first in each engine process, before importing SGLang."""
    if not torch.cuda.is_available():
        from megatron_dsrl.platform.sglang_cpu import absent_packages

        absent_packages.install()
        disable_compilation()


class EngineProcess(ForkProcess):
    """A process that dies with the server."""

    def run(self) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        die_with_parent(parent.pid)
        super().run()


class EngineContext(ForkContext):
    """Replaces the module `multiprocessing` in SGLang's launcher on CPU: the scheduler and the detokenizer are forked
    from the server, which has already imported SGLang.

    SGLang spawns them, since CUDA does not survive a fork. Each would import SGLang again, which takes longer than the
    rest of a tiny engine's start.
    """

    Process = EngineProcess

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """Set the start method for other processes that the server starts with `multiprocessing`."""
        multiprocessing.set_start_method(method, force)


def prepare_engine_launch() -> torch.distributed.TCPStore:
    """Run in an engine's server process before it launches its other processes.

    Returns the store in which the engine's ranks meet; keep it as long as the server runs. Rank 0 of the engine would
    open it on all network interfaces, to every host. This one listens on loopback, and torchrun's variable tells the
    ranks that it is there.
    """
    if not torch.cuda.is_available():
        from sglang.srt.entrypoints import engine

        engine.mp = EngineContext()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((LOOPBACK, 0))
        port = listener.getsockname()[1]
        store = torch.distributed.TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"tcp://{LOOPBACK}:{port}"
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return store


def run_scheduler_process(*args: Any, **kwargs: Any) -> Any:
    """SGLang's scheduler process, with this platform's attention backend, sampler and host memory."""
    from sglang.srt.managers.scheduler import run_scheduler_process as sglang_scheduler_process

    if not torch.cuda.is_available():
        from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

        from megatron_dsrl.platform.sglang_cpu import batched_attention, seeded_sampling

        batched_attention.register()
        seeded_sampling.register()
        ALLOC_MEMORY_FUNCS["cpu"] = allocate_unpinned
    return sglang_scheduler_process(*args, **kwargs)


def allocate_unpinned(
    dims: tuple[int, ...], dtype: torch.dtype, device: str, pin_memory: bool, allocator: Any
) -> torch.Tensor:
    """Ordinary host memory, in which SGLang keeps its tokens' routed experts. It would register that memory with
    CUDA."""
    return allocator.allocate(dims, dtype=dtype, device=device)


def skip_warmup(server_arguments: Any) -> bool:
    """Replaces SGLang's warm-up requests; returns False so that the server does not call `/freeze_gc`.

    SGLang 0.5.23 sends this call to itself right after the warm-up. Without a warm-up the port is not open yet: the
    call fails, garbage collection is not frozen, and the log shows a traceback. `EngineServer.wait_until_ready` makes
    the call once the port is open.
    """
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    get_global_state().tokenizer_manager.server_status = ServerStatus.Up
    return False
