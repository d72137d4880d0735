"""The disturbed training: started, watched and started again with the same command."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import psutil

from megatron_dsrl.common.process import LAUNCHER_VARIABLE
from megatron_dsrl.observability.records import METRICS_FILE
from megatron_dsrl.observability.timeline import trace_file
from tests.support.tiny_run import REPOSITORY
from tools.fault_soak.processes import Role, names, process_tree, reap

POLL_SECONDS = 0.01
END_SECONDS = 60.0
"""How long processes may outlive the command that started them: a checkpoint's thread gets a minute to end."""


class SoakFailure(Exception):
    """Something was not as it must be; the message says what."""


@dataclass
class Progress:
    """Where rank 0 of the running command is."""

    step: int = 0
    """0 while it starts."""
    parts: set[str] = field(default_factory=set)
    """Parts of that step that have begun; see `observability/timeline.py`."""


class Training:
    """One run folder and the `dsrl train` command that works in it."""

    def __init__(self, config: Path, run_folder: Path, options: Sequence[str], processes: int) -> None:
        self.folder = run_folder
        self.started_at = 0.0
        several = ("--processes", str(processes)) if processes > 1 else ()
        self._command = [
            *(sys.executable, "-m", "megatron_dsrl.cli", "train", str(config), *several),
            *(f"name={run_folder.name}", *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._output_before = 0

    @property
    def log(self) -> Path:
        """The output of all starts."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def start(self) -> None:
        """Start the command; it continues from the newest checkpoint. It dies with this process."""
        self._output_before = self.log.stat().st_size if self.log.exists() else 0
        self.started_at = time.time()
        self._process = subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env=os.environ | {LAUNCHER_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # not the file: a limited file size must not hit the output
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=_copy, args=(self._process.stdout, self.log), daemon=True)
        self._reader.start()

    @property
    def process_id(self) -> int:
        """Id of the command that was started last."""
        return self._running().pid

    def status(self) -> int | None:
        """Exit status as a shell gives it, 137 after SIGKILL; None while the command runs."""
        status = self._running().poll()
        return status if status is None or status >= 0 else 128 - status

    def processes(self, role: Role) -> list[psutil.Process]:
        """The living processes with this task."""
        return role(process_tree(self.process_id))

    def wait_for_end(self, seconds: float) -> int:
        """Wait until the command and all that it started have ended; returns its exit status.

        Raises:
            SoakFailure: they have not ended within the limit.
        """
        self.wait_until(lambda: self.status() is not None, seconds, "the command to end")
        deadline = time.monotonic() + END_SECONDS
        while left := reap(except_for=self.process_id):
            if time.monotonic() > deadline:
                raise SoakFailure(f"processes are left behind after {END_SECONDS:g} s: {', '.join(names(left))}")
            time.sleep(POLL_SECONDS)
        assert self._reader is not None
        self._reader.join(END_SECONDS)
        status = self.status()
        assert status is not None
        return status

    def wait_until(self, what: Callable[[], bool], seconds: float, name: str) -> None:
        """Wait until `what` is true; `name` describes it in the message.

        Raises:
            SoakFailure: it is still false after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                raise SoakFailure(f"waited {seconds:g} s for {name}; the end of {self.log}:\n{self.tail()}")
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """End the command and all that it started."""
        if self._process is not None:
            for process in reap(except_for=self._process.pid):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.wait_for_end(END_SECONDS)

    def progress(self) -> Progress:
        """Where the command is since its last start."""
        progress = Progress()
        for event in _records(trace_file(self.folder, rank=0)):
            if event["time"] < self.started_at or event["event"] == "call":
                continue
            if event["event"] == "step":
                progress = Progress(event["step"])
            elif event["event"] == "begin":
                progress.parts.add(event["name"])
        return progress

    def recorded_after(self, moment: float) -> float | None:
        """When the first step was recorded that was recorded after this moment (seconds since 1970)."""
        times = [record["time"] for record in _records(self.folder / METRICS_FILE)]
        return min((each for each in times if each > moment), default=None)

    def checkpoints(self) -> list[Path]:
        """The published ones, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step_*"))

    def partial_checkpoints(self) -> list[Path]:
        """Folders of checkpoints that are being written, or whose writer was killed."""
        return sorted((self.folder / "checkpoints").glob(".partial_step_*"))

    def output(self) -> str:
        """What the command has printed since its last start."""
        with open(self.log, "rb") as stream:
            stream.seek(self._output_before)
            return stream.read().decode(errors="replace")

    def tail(self) -> str:
        """The last 30 lines that the command has printed since its last start."""
        return "\n".join(self.output().splitlines()[-30:])

    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "the training was not started"
        return self._process


def _copy(source: BinaryIO, target: Path) -> None:
    with source, open(target, "ab", buffering=0) as stream:
        while part := source.read1():
            stream.write(part)


def _records(file: Path) -> list[dict]:
    """The complete lines of a file to which the run may be appending."""
    if not file.exists():
        return []
    records = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:  # cut off by a kill, or by a disk without room
            continue
    return records
