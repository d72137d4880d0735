"""The program of the process from which `tests.support.forked` forks.

It imports Megatron once, runs no test code itself and has one thread only: every fork begins as a new interpreter does
after the same imports.
"""

import atexit
import gc
import importlib
import os
import pickle
import selectors
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from megatron_dsrl.common.process import die_with_parent

PRELOADED = (
    "megatron_dsrl.train",
    "megatron_dsrl.evaluation.evaluate",
    "megatron_dsrl.conversion.verify",
    "torch.distributed.launcher.api",
    "transformers.models.qwen3.modeling_qwen3",
    "pytest",  # which modules of tests import
    "tests.support.tiny_run",
)
STREAMS = 3
"""Standard input, output and error."""

Task = tuple[Callable[..., Any], tuple[Any, ...]]


def main(stream: socket.socket, parent: int, prepare: str | None = None) -> None:
    """Fork a process for every request on the stream until its other end is closed.

    A request is one byte with the file descriptors of the process's standard streams, of a file with its task, and of
    the pipe for its exit status; the answer is the process id in 4 bytes.

    Args:
        stream: connected to `tests.support.forked`.
        parent: id of that process.
        prepare: name of a module whose `install()` is called first.
    """
    die_with_parent(parent)
    if prepare is not None:
        importlib.import_module(prepare).install()
    _import_everything()
    task = _serve(stream)
    if task is not None:
        _end(_status_of(*task))


def _status_of(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Call it; returns the exit status that an interpreter would have."""
    try:
        function(*arguments)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(status: int) -> NoReturn:
    """End as an interpreter does, except for freeing all modules one by one, which takes seconds."""
    threading._shutdown()  # waits for the threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _import_everything() -> None:
    from megatron_dsrl.platform import silence_expected_warnings

    silence_expected_warnings()
    for module in PRELOADED:
        importlib.import_module(module)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads after the imports: a fork has only the one that forks"
    gc.freeze()  # a collection in a fork would write to these objects, and so copy the memory that all forks share


def _serve(stream: socket.socket) -> Task | None:
    """Returns in every forked process with its task, and without one after the last request."""
    exits: dict[int, tuple[int, Connection]] = {}  # by the file descriptor of the process: its id, and whom to tell
    with selectors.DefaultSelector() as events:
        events.register(stream, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj is not stream:
                    events.unregister(key.fileobj)
                    _report_exit(key.fd, *exits.pop(key.fd))
                    continue
                request, descriptors, _, _ = socket.recv_fds(stream, 1, STREAMS + 2)
                if not request:
                    return None
                *streams, task_file, status_pipe = descriptors
                server, process_id = os.getpid(), os.fork()
                if process_id == 0:
                    die_with_parent(server)
                    for process, (_, tell_status) in exits.items():
                        os.close(process)
                        tell_status.close()
                    os.close(status_pipe)
                    stream.close()
                    return _begin(streams, task_file)
                for descriptor in (*streams, task_file):
                    os.close(descriptor)
                process = os.pidfd_open(process_id)
                exits[process] = process_id, Connection(status_pipe, readable=False)
                events.register(process, selectors.EVENT_READ)
                stream.sendall(process_id.to_bytes(4))


def _begin(streams: list[int], task_file: int) -> Task:
    """Give a new process its session, streams, environment and working folder; returns what it is to do."""
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    tempfile.tempdir = None  # may depend on the environment
    with open(task_file, "rb") as file:
        environment, folder, sys.path[:] = pickle.load(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        return pickle.load(file)


def _report_exit(process: int, process_id: int, tell_status: Connection) -> None:
    os.close(process)
    _, status = os.waitpid(process_id, 0)
    with suppress(OSError):  # the client may have closed the connection
        tell_status.send(os.waitstatus_to_exitcode(status))
    tell_status.close()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), *sys.argv[3:])
