"""What a program in the sandbox can do, and what ends it."""

import time

import psutil
import pytest

from megatron_dsrl.rewards.sandbox import Limits, Outcome, UnitTests, run_program

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


def test_tests_get_plain_data_by_value():
    program = """
import collections
def echo(value, *, times=1):
    return value if times == 1 else [value] * times
def f(kind, *values, **named):
    if kind == "echo":
        return echo(*values, **named)
    if kind == "count":
        return collections.Counter("aab")
    if kind == "iterate":
        return (n * n for n in range(3))
    if kind == "raise":
        raise ValueError("no such thing")
    return object()
"""
    source = """
for value in (None, True, 7, 10**5000, -0.5, float("inf"), "ü\\n", b"\\x00", 1j, [1, (2, 3)], {1, 2}, frozenset([1]),
              {1: "one", (2, 3): None}):
    assert f("echo", value) == value and type(f("echo", value)) is type(value)
assert f("echo", "x", times=2) == ["x", "x"] and f("count") == {"a": 2, "b": 1} and list(f("iterate")) == [0, 1, 4]
assert f("echo", float("nan")) != f("echo", float("nan"))
for kind, error in (("raise", "ValueError: no such thing"), ("object", "TypeError: only plain data")):
    try:
        f(kind)
    except Exception as caught:
        assert f"{type(caught).__name__}: {caught}".startswith(error), caught
    else:
        assert False, kind
"""
    outcome = run_program(program, LIMITS, UnitTests("f", source))
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
