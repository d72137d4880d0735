"""Running untrusted programs.

The program runs in a separate process, restricted by `sandbox_process.py`: limits of processor time, memory, file size
and processes, an empty environment, and its own temporary folder. If the kernel permits it (for ordinary users it does
on most Linux systems), the program also has no network, sees no other processes, and can open only Python's files and
those of its folder. This module is the caller's side: it enforces the time limit, kills everything that the program
started, and reads the verdict.

The tests run in another process, which calls the program's function and gets plain data back: the program can neither
read the tests or the verdict's token from memory, nor return an object that claims to be equal to everything. It can
still return hard-coded answers to tests that it guesses, and a program without tests judges itself.
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
    """Resources that a program may use."""

    wall_seconds: float = 5.0
    cpu_seconds: int = 5
    """Processor time of each process, in whole seconds because the kernel counts them so."""
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
    """Kernel restrictions in force: `namespaces`, `landlock`. Empty if the program never started."""


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


def run_program(program: str, limits: Limits, tests: UnitTests = UnitTests("", "")) -> Outcome:
    """Run Python source, with the standard library only, then its tests, and wait for them."""
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
    """Read the verdict. Only lines with the token count, which the program does not know."""
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
    """Kill all remaining processes. Children first: the sandbox's process adopts their orphans while it lives."""
    deadline = time.monotonic() + END_SECONDS
    try:
        family = psutil.Process(process.pid)
        while (children := family.children(recursive=True)) and time.monotonic() < deadline:
            for child in children:
                child.kill()
            psutil.wait_procs(children, timeout=0.05)
    except psutil.NoSuchProcess:
        pass  # it has exited, after killing its children
    process.kill()
    process.wait()
