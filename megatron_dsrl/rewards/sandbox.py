"""Running untrusted programs.

The program runs in a separate process without privileges, under limits of processor time, memory and threads, with an
empty environment. An isolated program has its own root file system (`sandbox_namespaces.py`): Python's files,
read-only, and one folder in memory with limited size. It has no network, sees no other processes, and makes only the
system calls of `sandbox_filter.py`: it cannot start processes, so every limit holds for the program as a whole. What
the kernel refuses to set up is an error, and the program is not started.

Where programs cannot be isolated, a caller may run them unsafely: with the limits of one process, the same system
calls, and Landlock if the kernel has it, in a temporary folder on disk.

This module is the caller's side: it starts the sandbox, waits and reads the verdict. It uses the standard library only.

The tests run in another process, which calls the program's function and gets plain data back: the program can neither
read the tests or the verdict's token from memory, nor return an object that claims to be equal to everything. It can
still return hard-coded answers to tests that it guesses, and a program without tests judges itself.
"""

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.scratch_folder import ScratchFolder
from megatron_dsrl.rewards.sandbox_filter import system_call_filter

CHILD = Path(__file__).with_name("sandbox_process.py")
FOLDER = "/sandbox"  # sandbox_namespaces.FOLDER
TIMED_OUT = 124  # sandbox_process.TIMED_OUT
RESULT_BYTES = 2**16  # capacity of a pipe
LONGEST_REPORT = 10_000  # sandbox_process.LONGEST_REPORT
END_SECONDS = 5.0
"""The sandbox keeps the time itself; a caller that has waited this much longer kills it."""
PREFIX = "dsrl-code-"
"""Beginning of the names of temporary folders, for programs that are not isolated."""


class NotIsolatedError(UserError):
    """This machine does not permit isolation; the program was not started."""


@dataclass(frozen=True)
class Limits:
    """Resources that a program may use, all its threads together."""

    wall_seconds: float = 5.0
    cpu_seconds: int = 5
    """Processor time, in whole seconds because the kernel counts them so."""
    memory_bytes: int = 2**30
    """Address space."""
    folder_bytes: int = 2**26
    """Content of its folder, which is in memory too; unsafe: size of each file."""
    folder_files: int = 4096
    """Files and folders in its folder; unsafe: not limited."""
    threads: int = 16
    """Threads, the main one included; unsafe: not limited."""


@dataclass(frozen=True)
class Outcome:
    """Result of running a program."""

    passed: bool
    """It ran to its end without an exception, and so did its tests."""
    reason: str
    """Empty when it passed; else `timeout`, the exception, or `exited with status N`."""
    report: str = ""
    """What the tests of a program that passed assigned to `report`, if it is a string; cut to LONGEST_REPORT."""


@dataclass(frozen=True)
class UnitTests:
    """Tests that decide whether a program passes."""

    entry_point: str
    """Name of the program's function in the tests. It takes and returns plain data by value: numbers, strings, bytes,
    None, and lists, tuples, sets, dicts and iterators of these."""
    source: str
    """Test code; passed when it runs to its end."""
    preparation: str = ""
    """Code that runs before, such as the problem's helpers that the tests use too."""


def run_program(program: str, limits: Limits, tests: UnitTests = UnitTests("", ""), isolated: bool = True) -> Outcome:
    """Run Python source, with the standard library only, then its tests, and wait for them; `isolated=False` runs it
    unsafely (see above).

    Raises NotIsolatedError if the kernel does not permit isolating the program, and UserError if libseccomp is missing.
    """
    token, refused = secrets.token_hex(16), secrets.token_hex(16)
    judging = {"tests": tests.source, "preparation": tests.preparation, "token": token}
    task = f"{json.dumps({'program': program})}\n{json.dumps(judging)}\n"
    settings = asdict(limits) | {
        "entry_point": tests.entry_point,
        "isolated": isolated,
        "refused": refused,
        "filter": base64.b64encode(system_call_filter()).decode(),
        "mount_point": tempfile.gettempdir(),
        "parent": os.getpid(),
    }
    if isolated:
        result, status = _run_process(task, settings | {"folder": FOLDER}, limits.wall_seconds)
    else:
        scratch = ScratchFolder(PREFIX)
        try:
            result, status = _run_process(task, settings | {"folder": str(scratch.path)}, limits.wall_seconds)
        finally:
            scratch.remove()
    return _outcome(result, status, token, refused)


def _run_process(task: str, settings: dict[str, object], wall_seconds: float) -> tuple[str, int]:
    """What the sandbox wrote, and its exit status."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as results:
        settings |= {"result": writing, "deadline": time.monotonic() + wall_seconds}
        folder = str(settings["folder"])
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(CHILD), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8"},
                pass_fds=[writing],
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            process.communicate(task.encode(), timeout=wall_seconds + END_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return "", TIMED_OUT
            raise
        os.set_blocking(reading, False)
        return (results.read(RESULT_BYTES) or b"").decode(errors="replace"), process.returncode


def _outcome(result: str, status: int, token: str, refused: str) -> Outcome:
    """Read the verdict. Only lines with the token count, which the program does not know."""
    for line in result.splitlines():
        mark, _, message = line.partition(" ")
        if mark == refused:
            raise NotIsolatedError(f"the kernel does not permit isolating a program: {message}")
        if mark == token:
            verdict, _, report = message.partition(" ")
            if verdict == "passed":
                return Outcome(True, "", base64.b64decode(report).decode())
            return Outcome(False, message)
    return Outcome(False, "timeout" if status == TIMED_OUT else f"exited with status {status}")
