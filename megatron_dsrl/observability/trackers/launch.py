"""The trackers of a training: one process each, which follows the run folder and never delays the training."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_dsrl.observability.trackers.base import Status, TrackerOptions
from megatron_dsrl.observability.trackers.cursor import log_file

PROCESS_MODULE = "megatron_dsrl.observability.trackers.process"
INTERRUPTED_SECONDS = 5.0
"""Time limit of the wait after an interrupted or failed training; the trackers' processes outlive it."""


class Trackers:
    """A context manager around a training on rank 0; ranks that do not call `start` have no trackers.

    Enter it before resources that must be closed first: on exit it waits, with a limit, for records still to be sent.
    """

    def __init__(self, trackers: Sequence[TrackerOptions], run_folder: Path, report: Callable[[str], None]) -> None:
        """`report` is called with a line for the user, from other threads as well."""
        self._trackers = trackers
        self._folder = run_folder
        self._report = report
        self._processes: list[_TrackerProcess] = []

    def start(self) -> None:
        """Start sending the records in the run folder, and later ones as they are written.

        Records of steps that will be repeated must already be removed.
        """
        self._processes += [_TrackerProcess(options, self._folder, self._report) for options in self._trackers]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)  # SystemExit, KeyboardInterrupt, Preempted
        status: Status = "finished" if kind is None else "interrupted" if interrupted else "failed"
        for process in self._processes:
            process.end(status)
        for process in self._processes:
            process.wait(status)


class _TrackerProcess:
    def __init__(self, options: TrackerOptions, run_folder: Path, report: Callable[[str], None]) -> None:
        self._options = options
        self._folder = run_folder
        self._report = report
        self._ending = False
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = self._start()
        except OSError as error:
            report(f"warning: tracker {options.name} could not be started ({error}); the run continues without it")
            return
        self._reader = threading.Thread(target=self._pass_on_messages, daemon=True)
        self._reader.start()

    def end(self, status: Status) -> None:
        """Tell it that the training has ended."""
        self._ending = True
        if self._process is not None:
            self._write(f"{status}\n")

    def wait(self, status: Status) -> None:
        """Wait until it has sent everything, with a limit."""
        if self._process is None:
            return
        # Its own limit comes first. If it outlives this one, only SIGKILL helps.
        limit = self._options.finish_seconds + 5 if status == "finished" else INTERRUPTED_SECONDS
        try:
            code = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            if status != "finished":
                return
            self._process.kill()
            code = self._process.wait()
        self._reader.join(1.0)
        if code != 0:
            name = self._options.name
            self._report(
                f"warning: tracker {name} has not received everything; "
                f"`dsrl upload {self._folder} --to {name}` sends the rest"
            )

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", PROCESS_MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the training
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        self._process = process
        request = {"run_folder": str(self._folder), "tracker": self._options.model_dump(mode="json")}
        self._write(json.dumps(request) + "\n")
        return process

    def _write(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:  # it has ended, which is reported elsewhere
            pass

    def _pass_on_messages(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self._report(line.rstrip())
        code = self._process.wait()
        if not self._ending:
            log = log_file(self._folder, self._options)
            self._report(
                f"warning: tracker {self._options.name} ended unexpectedly (status {code}); "
                f"the run continues, see {log}"
            )
