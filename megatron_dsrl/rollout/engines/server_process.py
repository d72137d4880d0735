"""Starts the process of an SGLang server, and ends it, with its descendants and the files that it leaves behind.

Importing SGLang is most of an engine's start on a CPU, and nothing about the run matters to it except a few environment
variables. So a training run starts the process before it imports Megatron itself, and passes the arguments when the run
folder is locked and everything has been checked.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

import megatron_dsrl
from megatron_dsrl.common.process import launched_rank
from megatron_dsrl.common.scratch_folder import ScratchFolder
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.platform.engine import ALLOCATOR_VARIABLES, ServerArguments, engine_environment
from megatron_dsrl.rollout.engines.address import API_KEY_VARIABLE
from megatron_dsrl.rollout.engines.server_arguments import engine_threads

SERVER_MAIN = "megatron_dsrl.rollout.engines.server_main"
"""Module that runs in the process."""
STOP_GRACE_SECONDS = 2.0
NOTED_FILES = "shared_memory"
"""File in a server's scratch folder with the names of its files in /dev/shm."""
SHARED_MEMORY_FILES = re.compile(r"/dev/shm/(?:sglang_loads_|sgl_shm_)[^\s/]+")
"""Names of SGLang's own files. Others, such as the weights that the trainer shares, are not the server's to remove."""


class ServerProcess:
    """A process that becomes an SGLang server, in its own session and group. It ends with the thread that starts it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start the process. Main thread only, which stays alive. `environment` is added to this process's."""
        assert threading.current_thread() is threading.main_thread()
        # SGLang leaves its sockets in the temporary folder; its name is short because socket paths are limited.
        self.scratch = ScratchFolder("dsrl-eng-", remove_noted_files)
        self._output = self.scratch.path / "output_before_serving"
        self._log_file: Path | None = None
        self._shared_memory: set[Path] = set()
        variables = {**inherited_environment(), "TMPDIR": str(self.scratch.path), **environment}
        variables.pop(API_KEY_VARIABLE, None)
        package_root = str(Path(megatron_dsrl.__file__).resolve().parents[1])
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", SERVER_MAIN, str(os.getpid())],
                env=variables | {"PYTHONPATH": os.pathsep.join(search_path)},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def serve(
        self, arguments: ServerArguments, environment: Mapping[str, str], key: str | None, log_file: Path
    ) -> None:
        """Have the process become the server; returns at once.

        Args:
            key: every caller must send it; None: the server answers everyone.
            log_file: receives its output from now on.
        """
        # Not arguments of the process, which every user of the machine could read.
        variables = {**environment, **({} if key is None else {API_KEY_VARIABLE: key})}
        order = {"arguments": arguments, "environment": variables, "log_file": str(log_file.resolve())}
        log_file.touch()
        self._log_file = log_file
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as stream:  # the caller finds out that it has ended
            stream.write(json.dumps(order).encode() + b"\n")

    @property
    def serves(self) -> bool:
        """Whether it was told to become the server."""
        return self._log_file is not None

    def note_shared_memory(self) -> None:
        """Note the server's files in /dev/shm, so that `end` removes them even if the server was killed before."""
        self._shared_memory |= shared_memory_files(self.process.pid)
        note_files(self._shared_memory, self.scratch.path)

    def end(self) -> None:
        """Kill it and everything that it started, and remove what they leave behind."""
        self.note_shared_memory()
        end_processes(self.process)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._save_output()
        for file in self._shared_memory:
            file.unlink(missing_ok=True)
        self.scratch.remove()

    def _save_output(self) -> None:
        """Append what the process wrote before it served, such as a failed import, to the server's log."""
        with suppress(OSError):  # a full disk; and many machines remove old files from the temporary folder
            output = self._output.read_bytes()
            if output and self._log_file is not None:
                with open(self._log_file, "ab") as log:
                    log.write(output)


@contextmanager
def starting_server(config: RolloutSettings) -> Iterator[ServerProcess | None]:
    """Start the process of this rank's server ahead of time, if it is to have one; end it unless it becomes a server.

    Needs no torch.distributed. The model must be a local folder, or one whose config.json the package includes.
    """
    owns_engine = launched_rank() % config.engine.tensor_parallel_size == 0
    if config.engine.urls or not config.rollout.needs_engines or not owns_engine:
        yield None
        return
    server = ServerProcess(engine_environment(config.engine.tensor_parallel_size, engine_threads(config)))
    try:
        yield server
    finally:
        if not server.serves:
            server.end()


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
        found.update(map(Path, SHARED_MEMORY_FILES.findall(maps)))
    return found


def note_files(files: Iterable[Path], scratch: Path) -> None:
    """Note these files in the server's scratch folder: a process that finds it left behind removes them."""
    with suppress(OSError):  # a full disk, or a folder that the machine has removed
        (scratch / NOTED_FILES).write_text("\n".join(map(str, files)))


def remove_noted_files(scratch: Path) -> None:
    """Remove the files that a killed process recorded in the folder it left behind."""
    with suppress(FileNotFoundError):
        for file in SHARED_MEMORY_FILES.findall((scratch / NOTED_FILES).read_text()):
            Path(file).unlink(missing_ok=True)


def end_processes(server: "subprocess.Popen[bytes]") -> None:
    """Kill a server, which leads a process group, and everything that it started."""
    # Not SIGTERM: an engine has nothing to save, and SGLang takes up to five seconds to react by killing its
    # processes. They die with the server; multiprocessing's resource tracker then cleans up and exits by itself.
    spawned = processes_of(server.pid)[1:]
    server.kill()
    server.wait()
    _wait_for_the_end_of(spawned)
    late = _processes_of_group(server.pid)  # such as one that the server was just starting
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    _wait_for_the_end_of(late)


def _wait_for_the_end_of(processes: Sequence[psutil.Process]) -> None:
    deadline = time.monotonic() + STOP_GRACE_SECONDS
    while any(map(_is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _processes_of_group(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group:
                found.append(process)
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
