"""The processes of an SGLang server: what they inherit, how they are ended, and what they leave behind."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil

from megatron_dsrl.platform.engine import ALLOCATOR_VARIABLES

STOP_GRACE_SECONDS = 2.0
SHARED_MEMORY = re.compile(r"/dev/shm/(?:sglang_loads_|sgl_shm_)\S+")
"""Names of SGLang's own files. Others, such as the weights that the trainer shares, are not the server's to remove."""


def inherited_environment() -> dict[str, str]:
    """This process's environment without variables that are meant for the trainer alone: torchrun's rendezvous, which
    SGLang's own process group would use; the paths of collective records, which the engine's ranks would overwrite; and
    PyTorch's allocator settings, since SGLang cannot release memory of expandable segments."""
    rendezvous = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    records = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in (*rendezvous, *records, *ALLOCATOR_VARIABLES) and not name.startswith("TORCHELASTIC_")
    }


def processes_of(process_id: int) -> list[psutil.Process]:
    """A process and its descendants; empty if it has ended."""
    try:
        process = psutil.Process(process_id)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def shared_memory_files(process_id: int) -> set[Path]:
    """Files in /dev/shm that SGLang made for a server and does not remove when it is killed."""
    found: set[Path] = set()
    for process in processes_of(process_id):
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has ended
            continue
        found.update(map(Path, SHARED_MEMORY.findall(maps)))
    return found


def end_processes(server: "subprocess.Popen[bytes]") -> None:
    """Kill a server, which leads a process group, and everything that it started."""
    # Not SIGTERM: an engine has nothing to save, and SGLang takes up to five seconds to react by killing its
    # processes. They die with the server; multiprocessing's resource tracker then cleans up and exits by itself.
    spawned = processes_of(server.pid)[1:]
    server.kill()
    server.wait()
    deadline = time.monotonic() + STOP_GRACE_SECONDS
    while any(map(_is_alive, spawned)) and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
