"""What a program in the sandbox can do, and what ends it."""

import time

import psutil
import pytest

from megatron_dsrl.rewards.sandbox import Limits, Outcome, run_program

LIMITS = Limits(wall_seconds=10, cpu_seconds=5, memory_bytes=2**29, file_bytes=2**20)


def run(program: str, **limits) -> Outcome:
    return run_program(program, Limits(**{**LIMITS.__dict__, **limits}))


def test_ordinary_programs_pass():
    program = """
import collections, dataclasses, decimal, functools, heapq, json, math, random, re, tempfile
@dataclasses.dataclass
class Point:
    x: int
assert Point(3).x == 3 and __name__ == "__main__"
with open("notes.txt", "w") as file:
    file.write("mine")
assert open("notes.txt").read() == "mine"
tempfile.mkdtemp()
"""
    outcome = run(program)
    assert (outcome.passed, outcome.reason) == (True, "")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended with status 0"),
        ("bytearray(2**30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(2**22))", "OSError"),
        ("[open('/dev/null') for _ in range(100)]", "OSError"),
        ("import os; os.kill(os.getpid(), 11); os.abort()", "ended with status"),
        ("import ctypes; ctypes.string_at(0)", ""),
    ],
)
def test_programs_that_fail_or_take_too_much(program, reason):
    outcome = run(program)
    assert not outcome.passed
    assert reason in outcome.reason


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)",
        "import socket; socket.create_server(('127.0.0.1', 0))",
        "open('/etc/passwd').read()",
        "open({outside!r}, 'w')",
        "import os; os.remove({outside!r})",
        "import os; os.listdir({outside!r} + '/..')",
    ],
)
def test_no_network_and_no_foreign_files(program, tmp_path):
    import socket

    outside = tmp_path / "precious"
    outside.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = run(program.format(port=server.getsockname()[1], outside=str(outside)))
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not outcome.passed and "Error" in outcome.reason
    assert outside.read_text() == "kept"


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("import os; assert 'HF_TOKEN' not in os.environ").passed


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited(program):
    started = time.monotonic()
    outcome = run(program, wall_seconds=1.0)
    assert (outcome.passed, outcome.reason) == (False, "timeout")
    assert time.monotonic() - started < 8


@pytest.mark.parametrize("ending", ["", "time.sleep(60)"])
def test_nothing_that_it_started_outlives_it(ending):
    mark = f"dsrl-sandbox-test-{time.time_ns()}"
    program = f"""
import ctypes, os, sys, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(15, b"{mark[-15:]}", 0, 0, 0)
        time.sleep(60)
        os._exit(0)
time.sleep(0.3)
{ending}
"""
    run(program, wall_seconds=2.0)
    assert [process.pid for process in psutil.process_iter(["name"]) if process.info["name"] == mark[-15:]] == []
