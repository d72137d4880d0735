"""Running a program that nobody has read.

The program runs in a process of its own, whose guards are in `sandbox_process.py`: limits of processor time, memory,
file size and processes, an empty environment, and a folder of its own. Where the kernel permits it (it does for
ordinary users of most Linux systems) it also has no network, sees no other processes, and can open no files but
Python's and its folder's. The caller's part is here: the limit on time, the end of everything that the program
started, and the verdict.

Its tests run in another process, which calls the program's function and gets plain data back: the program can neither
read the tests or the verdict's token from memory, nor return an object that claims to be equal to everything. It can
still answer what it has guessed the tests to be, and without tests a program is its own judge.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

CHILD = Path(__file__).with_name("sandbox_process.py")
RESULT_BYTES = 4096
END_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    wall_seconds: float = 5.0
    cpu_seconds: int = 5
    """Of each process; whole seconds, as the kernel counts them."""
    memory_bytes: int = 2**30
    """Address space of each process."""
    file_bytes: int = 2**24
    """Size of each file."""
    processes: int = 16
    """Processes and threads. The kernel does not enforce it for root."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It ran to its end without an exception, and so did its tests."""
    reason: str
    """Empty when it passed; else `timeout`, the exception, or `ended with status N`."""
    isolation: tuple[str, ...]
    """The guards of the kernel that were in force: `namespaces`, `landlock`. Empty when the program never started."""


@dataclass(frozen=True)
class UnitTests:
    """What decides whether a program passes."""

    entry_point: str
    """The program's function, which the tests find under this name. It takes and returns plain data: numbers, strings,
    bytes, None, and lists, tuples, sets, dicts and iterators of these, by value."""
    source: str
    """Passed when it runs to its end."""
    preparation: str = ""
    """Runs before, such as the problem's helpers that the tests use too."""


def run_program(program: str, limits: Limits, tests: UnitTests = UnitTests("", "")) -> Outcome:
    """Run Python source with the standard library only, then its tests, and wait for their end."""
    token = secrets.token_hex(16)
    judging = {"tests": tests.source, "preparation": tests.preparation, "token": token}
    task = f"{json.dumps({'program': program})}\n{json.dumps(judging)}\n"
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="dsrl-code-", ignore_cleanup_errors=True) as folder:
        settings = json.dumps(asdict(limits) | {"folder": folder, "result": writing, "entry_point": tests.entry_point})
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8"},
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        try:
            process.communicate(task.encode(), timeout=limits.wall_seconds)
            reason = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = "timeout"
        finally:
            _end(process)
            os.set_blocking(reading, False)
            result = _read(reading)
            os.close(reading)
    return _outcome(result, token, reason)


def _outcome(result: str, token: str, reason: str) -> Outcome:
    """The program may write to the pipe as well, but it does not know the token."""
    isolation: tuple[str, ...] = ()
    for line in result.splitlines():
        mark, _, message = line.partition(" ")
        if mark != token:
            continue
        if message.startswith("isolation"):
            isolation = tuple(message.split()[1:])
        else:
            passed = message == "passed"
            return Outcome(passed, "" if passed else message, isolation)
    return Outcome(False, reason, isolation)


def _read(descriptor: int) -> str:
    try:
        return os.read(descriptor, RESULT_BYTES).decode(errors="replace")
    except BlockingIOError:
        return ""


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill whatever is left. Children first: their orphans come to the sandbox's process as long as it lives."""
    deadline = time.monotonic() + END_SECONDS
    try:
        family = psutil.Process(process.pid)
        while (children := family.children(recursive=True)) and time.monotonic() < deadline:
            for child in children:
                child.kill()
            psutil.wait_procs(children, timeout=0.05)
    except psutil.NoSuchProcess:
        pass  # it has ended, and has ended its children before
    process.kill()
    process.wait()
