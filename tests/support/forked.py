"""Processes that have Megatron imported when they start: forks of one server process for the whole test session, or
of one more for each way of preparing it.

The imports take some eight seconds of CPU time, a fork takes milliseconds. Where a test is about how a program starts,
it starts a separate interpreter instead.
"""

import atexit
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]


class ForkedProcess:
    """The interface of `subprocess.Popen` for a process that the server has forked."""

    def __init__(self, pid: int, status: Connection, name: str) -> None:
        self.pid = pid
        self.status = status
        """Becomes readable when the process has ended: for `multiprocessing.connection.wait`."""
        self._name = name
        self._exit_status: int | None = None

    def poll(self) -> int | None:
        """Exit status, or minus the number of the signal that killed it; None while it runs."""
        if self._exit_status is None and self.status.poll():
            self._exit_status = self.status.recv()
        return self._exit_status

    def wait(self, timeout: float | None = None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it has not ended within that many seconds.
        """
        if self._exit_status is None and not self.status.poll(timeout):
            assert timeout is not None
            raise subprocess.TimeoutExpired(self._name, timeout)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(
    function: Callable[..., Any],
    *arguments: Any,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    output: int = 1,
    errors: int = 2,
    prepare: str | None = None,
) -> ForkedProcess:
    """Call `function(*arguments)` in a new process, which leads its own session and dies with this process.

    Args:
        function: importable. The process ends with status 0, or with that of a `SystemExit`, or with 1 after an error.
        arguments: picklable.
        environment: all variables; default: this process's.
        folder: working folder; default: this process's.
        output: file descriptor that becomes standard output.
        errors: file descriptor that becomes standard error.
        prepare: name of a module whose `install()` has run in the process before anything else was imported.
    """
    server = _server(prepare)
    receive_status, send_status = Pipe(duplex=False)
    with tempfile.TemporaryFile() as task, open(os.devnull) as nothing:
        pickle.dump((dict(environment or os.environ), str(folder or Path.cwd()), sys.path), task)
        pickle.dump((function, arguments), task)
        task.seek(0)  # the process shares the position
        descriptors = [nothing.fileno(), output, errors, task.fileno(), send_status.fileno()]
        socket.send_fds(server.stream, [b"f"], descriptors)
        pid = server.stream.recv(4, socket.MSG_WAITALL)
    send_status.close()
    assert len(pid) == 4, "the fork server has ended; its error is in the output of the first test that used it"
    return ForkedProcess(int.from_bytes(pid), receive_status, f"{function}{arguments}")


def forked_processes() -> list[psutil.Process]:
    """Processes started by `fork`, and their descendants, that are still running."""
    found = [child for server in _servers for child in psutil.Process(server.process.pid).children(recursive=True)]
    return [process for process in found if _runs(process)]


class _Server(NamedTuple):
    process: subprocess.Popen[bytes]
    stream: socket.socket


_servers: list[_Server] = []


@cache
def _server(prepare: str | None) -> _Server:
    ours, servers = socket.socketpair()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.support.fork_server", str(servers.fileno()), str(os.getpid())),
            *([prepare] if prepare else []),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
        pass_fds=[servers.fileno()],
        start_new_session=True,
    )
    servers.close()

    def stop() -> None:
        process.kill()
        process.wait()

    atexit.register(stop)
    server = _Server(process, ours)
    _servers.append(server)
    return server


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
