"""Run a command with a time limit, and leave nothing of it behind."""

import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.gpu_record.machine import ROOT

LIMIT_STATUS = 124
"""Exit status of a command that was ended at its time limit, like that of `timeout`."""
COLUMNS = "112"
"""Width of its tables: the output goes to a log."""
SECONDS_FOR_STACKS = 30.0
"""Limit for writing stacks, which takes a moment on an idle machine."""
POLL_SECONDS = 0.05
LAUNCHER = "torch.distributed.run"


@dataclass(frozen=True)
class Outcome:
    """A command that has ended."""

    command: str
    status: int
    """Exit status; negative for a signal, `LIMIT_STATUS` at the time limit."""
    seconds: float
    log: Path
    """Its output, stdout and stderr together."""

    @property
    def problem(self) -> str | None:
        """How it failed; None if it did not."""
        if self.status == 0:
            return None
        if self.status == LIMIT_STATUS:
            return f"stopped at its time limit, after {self.seconds:.0f} s"
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name} after {self.seconds:.0f} s"
        return f"exit status {self.status} after {self.seconds:.0f} s"

    def last_lines(self, count: int) -> list[str]:
        """The end of its output."""
        return self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-count:]


def run_python(
    arguments: Sequence[str],
    log: Path,
    limit_seconds: float,
    variables: Mapping[str, str] = {},  # noqa: B006  (never changed)
    show: Callable[[str], None] | None = None,
) -> Outcome:
    """Run this Python with arguments from the repository's folder; a failure is in the result.

    A command that reaches its limit first writes the Python stacks of all its processes to its log.

    Args:
        arguments: such as `-m megatron_dsrl.cli doctor`.
        log: receives the output; its folder is created.
        limit_seconds: time limit.
        variables: environment variables in addition to the inherited ones.
        show: called with each line of output; None shows nothing.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = {"PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "COLUMNS": COLUMNS}
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT, env=os.environ | settings | dict(variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_no_core_files,
    )  # fmt: skip
    copier = threading.Thread(target=_copy_output, args=(process, log, show), daemon=True)
    copier.start()
    try:
        status = process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        _write_stacks(process.pid)
        status = LIMIT_STATUS
    finally:
        _kill(process)
    copier.join(10)  # a process that was left behind may hold the pipe open
    return Outcome(f"python {shlex.join(arguments)}", status, time.monotonic() - begin, log)


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)


def _no_core_files() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _copy_output(process: subprocess.Popen[bytes], log: Path, show: Callable[[str], None] | None) -> None:
    assert process.stdout is not None
    with log.open("wb") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            if show is not None:
                show(line.decode(errors="replace").rstrip("\n"))


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _write_stacks(pid: int) -> None:
    """Have every Python process of a command write its stacks and end: faulthandler does so at SIGABRT."""
    signalled: list[psutil.Process] = []
    for process in _tree(pid)[::-1]:
        with suppress(psutil.Error):
            command = process.cmdline()
            if "python" in process.name().lower() and LAUNCHER not in command:
                process.send_signal(signal.SIGABRT)
                signalled.append(process)
    deadline = time.monotonic() + SECONDS_FOR_STACKS
    while any(map(_runs, signalled)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _runs(process: psutil.Process) -> bool:
    """Whether a process has not ended yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    for each in _tree(process.pid):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(30)
