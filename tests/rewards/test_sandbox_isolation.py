"""Machines on which programs cannot be isolated: programs are refused unless the user allows unsafe ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dsrl.rewards.registry import check_options
from megatron_dsrl.rewards.sandbox_isolation import describe_isolation
from tests.support.tiny_run import REPOSITORY

WITHOUT_NAMESPACES = """
import ctypes, errno, sys
seccomp = ctypes.CDLL("libseccomp.so.2")
seccomp.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(seccomp.seccomp_init(0x7FFF0000))
for name in (b"unshare", b"mount"):
    number = seccomp.seccomp_syscall_resolve_name(name)
    assert seccomp.seccomp_rule_add_array(context, 0x00050000 | errno.EPERM, number, 0, None) == 0
assert seccomp.seccomp_load(context) == 0
"""


def without_namespaces(script: str) -> list[str]:
    """Lines that a script prints where the kernel refuses namespaces, as in most containers."""
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_NAMESPACES + script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def test_without_isolation_no_program_is_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = f"""
import asyncio, json
from megatron_dsrl.rewards.code import code
from megatron_dsrl.rewards.registry import check_options, describe_verifier
from megatron_dsrl.rollout.python_tool import PythonTool
from megatron_dsrl.rollout.tool_chat import ToolChat
answer = json.dumps({{"prompt": "", "entry_point": "f", "test": "def check(f): pass"}})
program = "```python\\nopen({str(mark)!r}, 'w')\\ndef f(): pass\\n```"
parts = {{"parts": [{{"function": "code"}}]}}
for attempt in (lambda: code(program, answer), lambda: check_options("code", {{}}),
                lambda: check_options("combination", parts), lambda: ToolChat("python")):
    try:
        print("not refused", attempt())
    except ValueError as error:
        print(error)
print(describe_verifier("combination", parts))
check_options("code", {{"allow_unsafe": True}})
print(describe_verifier("code", {{"allow_unsafe": True}}))
print(code(program.replace({str(mark)!r}, "here"), answer, allow_unsafe=True))
print(asyncio.run(PythonTool(allow_unsafe=True)("6 * 7")))
"""
    lines = without_namespaces(script)
    why = "the kernel does not permit isolating a program: [Errno 1] user namespace: Operation not permitted"
    assert lines[0] == why
    for line, field in zip(lines[1:3], ("reward.function", "reward.options.parts.0.function")):
        assert line.startswith(f"{field}: `code` runs programs") and why in line and "allow_unsafe: true" in line
    assert lines[3].startswith("tool: ") and "the Python tool runs programs that a model wrote" in lines[3]
    assert why in lines[3] and "allow_unsafe: true" in lines[3]
    assert lines[4:] == [
        f"code: programs are refused: {why}",
        f"code: programs run UNSAFELY (allow_unsafe) and can reach your files: {why}",
        "1.0",
        "42",
    ]
    assert not mark.exists()


def test_a_machine_that_isolates_says_so(isolation: None) -> None:
    check_options("code", {})
    assert describe_isolation({}) == describe_isolation({"allow_unsafe": True}) == "code: programs are isolated"


def test_a_missing_libseccomp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    from megatron_dsrl.rewards import sandbox_filter

    def missing(name: str) -> None:
        raise OSError("libseccomp.so.2: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(ValueError, match="the sandbox needs libseccomp"):
        sandbox_filter.system_call_filter.__wrapped__()
