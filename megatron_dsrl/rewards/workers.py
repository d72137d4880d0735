"""The processes of a reward pool: small, deaf to the signals that end a job, and continued if something stops them."""

import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import psutil
from pebble import ProcessExpired

SIGNALS_TO_STOP = {signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP}
EXIT_UNKNOWN = 255  # what multiprocessing reports when the fork server is gone
EXITED_WITH_0 = 256  # beyond every real status
QUIET_TRACKER = "ignore::UserWarning:multiprocessing.resource_tracker"
"""Python option. A killed process leaves semaphores, which the tracker removes with a needless warning."""
LOOK_SECONDS = 1.0
"""Interval between searches for stopped workers."""


class WorkerProcess(ForkServerProcess):
    """A worker; it has SIGTERM blocked."""

    def start(self) -> None:
        """Start the worker, and the fork server if it has died since the last start."""
        start_fork_server()  # it may have died since the last one
        super().start()

    def terminate(self) -> None:
        """Called by the pool to end the worker."""
        self.kill()

    @property
    def exitcode(self) -> int | None:
        """The exit status, with 0 replaced: the pool takes 0 for a requested exit and would wait for the answer."""
        code = super().exitcode
        return EXITED_WITH_0 if code == 0 else code


class WorkerContext(ForkServerContext):
    """Makes workers, and continues those that are stopped (SIGSTOP) until it is closed.

    The pool's time limit begins when a worker takes a response, which a stopped one never does.
    """

    def __init__(self) -> None:
        self._workers: list[WorkerProcess] = []
        self._closed = threading.Event()
        threading.Thread(target=self._continue_stopped, name="stopped reward workers", daemon=True).start()

    def Process(self, *arguments: Any, **options: Any) -> WorkerProcess:  # type: ignore[override]  # noqa: N802
        """A new worker; the method's name is that of multiprocessing's contexts."""
        worker = WorkerProcess(*arguments, **options)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        """Leave stopped workers alone from now on."""
        self._closed.set()

    def _continue_stopped(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            self._workers = [worker for worker in self._workers if worker.pid is None or _go_on(worker.pid)]


def _go_on(process_id: int) -> bool:
    """Continue a process if it is stopped; False if it has ended."""
    try:
        process = psutil.Process(process_id)
        if process.status() == psutil.STATUS_STOPPED:
            process.resume()
    except psutil.Error:
        return False
    return True


def end_of_worker(error: ProcessExpired) -> str:
    """How a worker ended unexpectedly."""
    code = error.exitcode
    if code is None or code == EXIT_UNKNOWN:
        return "died; its exit status is unknown"
    if code < 0:
        return f"died: killed by {signal.Signals(-code).name}"
    return f"died: it ended its own process with status {0 if code == EXITED_WITH_0 else code}"


def may_be_innocent(error: ProcessExpired) -> bool:
    """Whether something other than the response may have ended the worker."""
    return error.exitcode is None or error.exitcode < 0 or error.exitcode == EXIT_UNKNOWN


def start_fork_server() -> None:
    """Start the fork server unless it is running, with stop signals blocked for it and the workers.

    SLURM may send them to all processes of a job, and a closing terminal to all of its processes. The trainer decides
    when to stop and needs its workers until then; a pool without its fork server can neither be used nor closed.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_TO_STOP)
    sys.warnoptions.append(QUIET_TRACKER)  # which the tracker inherits
    try:
        resource_tracker.ensure_running()  # ignores SIGTERM itself, but unblocks it in this process
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_TO_STOP)
        forkserver.ensure_running()
    finally:
        sys.warnoptions.remove(QUIET_TRACKER)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
