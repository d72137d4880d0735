"""What a program in the sandbox can do, what ends it, and what it leaves behind: nothing."""

import builtins
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_dsrl.common.scratch_folder import NEW_SECONDS
from megatron_dsrl.rewards.sandbox import PREFIX, Limits, Outcome, UnitTests, run_program
from tests.support.sandbox_limits import LIMITS
from tests.support.tiny_run import REPOSITORY
from tests.support.waiting import wait_until

ORDINARY_USER = 12345
SYSTEM_PYTHON = "/usr/bin/python3"


def run(program: str, **limits: float) -> Outcome:
    return run_program(program, Limits(**{**LIMITS.__dict__, **limits}))


def run_as_ordinary_user(programs: list[str]) -> list[Outcome]:
    """Outcomes of isolated programs that another user than root starts, with the system's own Python."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; as an ordinary user, the other tests cover this")
    if subprocess.run([SYSTEM_PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip(f"{SYSTEM_PYTHON} is missing or older than 3.11")
    script = (
        "import json, sys\n"
        "from megatron_dsrl.rewards.sandbox import Limits, run_program\n"
        "programs, limits = json.load(sys.stdin)\n"
        "print(json.dumps([vars(run_program(program, Limits(**limits))) for program in programs]))\n"
    )
    finished = subprocess.run(
        [SYSTEM_PYTHON, "-B", "-c", script],
        input=json.dumps([programs, LIMITS.__dict__]),
        env={"PYTHONPATH": str(REPOSITORY)},
        cwd="/",
        user=ORDINARY_USER,
        group=ORDINARY_USER,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=200,
    )
    if finished.returncode and ("NotIsolatedError" in finished.stderr or "No module named" in finished.stderr):
        pytest.skip(finished.stderr.strip().splitlines()[-1])
    assert finished.returncode == 0, finished.stderr
    return [Outcome(**outcome) for outcome in json.loads(finished.stdout)]


ORDINARY_PROGRAM = """
import asyncio, collections, concurrent.futures, dataclasses, decimal, functools, heapq, hashlib, json, math, os, random
import re, shutil, tempfile, time
@dataclasses.dataclass
class Point:
    x: int
assert Point(3).x == 3 and __name__ == "__main__"
with open("notes.txt", "w") as file:
    file.write("mine")
assert open("notes.txt").read() == "mine"
shutil.copy2("notes.txt", "copy.txt")
shutil.move("copy.txt", "moved.txt")
os.makedirs("a/b")
shutil.rmtree("a")
tempfile.mkdtemp()
async def three():
    await asyncio.sleep(0.01)
    return 3
assert asyncio.run(three()) == 3
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    assert list(pool.map(abs, [-1, 2])) == [1, 2]
open("/dev/null", "w").write("x")
"""


def test_ordinary_programs_pass(isolation: None) -> None:
    outcome = run(ORDINARY_PROGRAM)
    assert (outcome.passed, outcome.reason) == (True, "")


def test_tests_get_plain_data_by_value(isolation: None) -> None:
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


def test_a_program_cannot_end_the_tests_iteration(isolation: None) -> None:
    outcome = run_program("def f(x):\n    raise StopIteration", LIMITS, UnitTests("f", "assert all(map(f, [1, 2]))"))
    assert (outcome.passed, outcome.reason) == (False, "StopIteration: ")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "exited with status 0"),
        ("bytearray(2**30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(2**22))", "OSError"),
        ("[open('/dev/null') for _ in range(100)]", "OSError"),
        ("import signal; signal.raise_signal(11)", "exited with status -11"),
        ("import os; os.abort()", "exited with status -6"),
        ("import ctypes; ctypes.string_at(0)", "exited with status -11"),
    ],
)
def test_programs_that_fail_or_take_too_much(isolation: None, program: str, reason: str) -> None:
    outcome = run(program)
    assert not outcome.passed
    assert reason in outcome.reason


CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
"""
ATTACKS = {
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "connect to a Unix socket": "import socket; socket.socket(socket.AF_UNIX).connect({unix!r})",
    "send to a Unix socket": """
import socket
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
a.sendto(b'hello', {unix!r})""",
    "read": "open('/etc/passwd').read()",
    "write": "open({outside!r}, 'w')",
    "write next to another folder": """
import os
os.open({outside!r}[1:], os.O_WRONLY, dir_fd=os.open('/', os.O_RDONLY))""",
    "remove": "import os; os.remove({outside!r})",
    "truncate": "import os; os.truncate({outside!r}, 0)",
    "list": "import os; os.listdir({outside!r} + '/..')",
    "look": "import os; os.stat({outside!r})",
    "change permissions": "import os; os.chmod({outside!r}, 0o777)",
    "change permissions of Python": "import os; os.chmod(os.__file__, os.stat(os.__file__).st_mode)",
    "change times": "import os; os.utime({outside!r})",
    "change attributes": "import os; os.setxattr({outside!r}, 'user.mine', b'1')",
    "watch a folder": CALL + "call('inotify_add_watch', libc.inotify_init(), b'/sandbox', 0x100)",
    "run a program": "import subprocess; subprocess.run(['/bin/true'])",
    "fork unseen": CALL + "call('fork')",
    "become a program unseen": CALL + "call('execv', b'/bin/true', (ctypes.c_char_p * 2)(b'true', None))",
    "become a program": "import os; os.execv('/bin/true', ['true'])",
    "fork": "import os; os.fork()",
    "signal the tests": "import os; os.kill(1, 15)",
    "stop its group": "import os, signal; os.kill(0, signal.SIGSTOP)",
    "trace the tests": CALL + "call('ptrace', 16, 1, 0, 0)",
    "read the tests' memory": "open('/proc/1/mem', 'rb')",
    "slow down others": "import os; os.setpriority(os.PRIO_PROCESS, 1, 19)",
    "open a process": "import os; os.pidfd_open(1)",
    "limit others": "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
    "get privileges": CALL + "call('unshare', 0x10000000)",
    "mount": CALL + "call('mount', b'tmpfs', b'/sandbox', b'tmpfs', 0, None)",
    "memory that is not a mapping": "import os; os.memfd_create('m')",
    "shared memory": CALL + "call('shmget', 0, 2**20, 0o1600)",
    "io_uring": CALL + "call('syscall', 425, 8, ctypes.create_string_buffer(120))",
    "keys": CALL + "call('syscall', 248, b'user', b'd', b'p', 1, -3)",
    "become root": "import os; os.setuid(0); open('/usr/mine', 'w')",
}  # fmt: skip


@pytest.fixture
def outside() -> Iterator[dict[str, str | int]]:
    """A file, a TCP port and a Unix socket open to everyone; checks that they were not touched."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        os.chmod(folder, 0o755)
        file, path = Path(folder, "precious"), f"{folder}/socket"
        file.write_text("kept")
        unix.bind(path)
        unix.listen()
        for each in (file, path):
            os.chmod(each, 0o666)
        before = file.stat()
        yield {"outside": str(file), "port": server.getsockname()[1], "unix": path}
        for listener in (server, unix):
            listener.settimeout(0.1)
            with pytest.raises(TimeoutError):
                listener.accept()
        after = file.stat()
        assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, 4)
        assert os.listxattr(file) == []


def check_refused(outcome: Outcome) -> None:
    """The program ended with an error of the operating system, and not because the attack was written wrongly."""
    kind = getattr(builtins, outcome.reason.partition(":")[0], None)
    assert isinstance(kind, type) and issubclass(kind, OSError), outcome


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_nothing_outside_can_be_reached(isolation: None, attack: str, outside: dict) -> None:
    check_refused(run(attack.format(**outside)))


def test_programs_of_an_ordinary_user_cannot_reach_anything_either(outside: dict) -> None:
    attacks = [attack.format(**outside) for attack in ATTACKS.values()]
    *outcomes, good = run_as_ordinary_user([*attacks, ORDINARY_PROGRAM])
    for outcome in outcomes:
        check_refused(outcome)
    assert (good.passed, good.reason) == (True, "")


FILL_THE_DISK = """
import os
for number in range(50):
    with open(f"file-{number}", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2**16)
"""
MAKE_FILES = "for number in range(1000):\n    open(f'file-{number}', 'w').close()"
TAKE_MEMORY_IN_THREADS = """
import mmap, threading
def take():
    kept.append(mmap.mmap(-1, 2**27))
kept, threads = [], [threading.Thread(target=take) for _ in range(3)]
for thread in threads:
    thread.start()
    thread.join()
kept += [mmap.mmap(-1, 2**27)]
"""
START_THREADS = """
import threading, time
for _ in range(8):
    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
"""
WHOLE = {
    "disk": (FILL_THE_DISK, "No space left on device"),
    "number of files": (MAKE_FILES, "No space left on device"),
    "memory": (TAKE_MEMORY_IN_THREADS, "Cannot allocate memory"),
    "threads": (START_THREADS, "can't start new thread"),
}


@pytest.mark.parametrize(("program", "reason"), WHOLE.values(), ids=WHOLE.keys())
def test_limits_hold_for_the_whole_program(isolation: None, program: str, reason: str) -> None:
    assert reason in run(program).reason


def test_limits_hold_for_programs_of_an_ordinary_user() -> None:
    outcomes = run_as_ordinary_user([program for program, _ in WHOLE.values()])
    for outcome, (_, reason) in zip(outcomes, WHOLE.values()):
        assert reason in outcome.reason


def test_the_environment_is_empty(isolation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("import os; assert 'HF_TOKEN' not in os.environ").passed


STOP_ITSELF = "import signal\nsignal.raise_signal(signal.SIGSTOP)"


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", STOP_ITSELF])
@pytest.mark.parametrize("isolated", [True, False])
def test_time_is_limited(program: str, isolated: bool, request: pytest.FixtureRequest) -> None:
    if isolated:
        request.getfixturevalue("isolation")
    started = time.monotonic()
    outcome = run_program(program, Limits(wall_seconds=1.0), isolated=isolated)
    assert (outcome.passed, outcome.reason) == (False, "timeout")
    assert time.monotonic() - started < 5  # less than when the caller has to end it


def test_unsafe_programs_have_no_sockets_and_no_processes() -> None:
    for name in ("connect", "fork", "run a program", "stop its group", "signal the tests"):
        outcome = run_program(ATTACKS[name].format(port=1), LIMITS, isolated=False)
        assert "PermissionError" in outcome.reason


@pytest.mark.parametrize("isolated", [True, False])
def test_nothing_is_left_when_the_caller_is_killed(
    isolated: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if isolated:
        request.getfixturevalue("isolation")
    script = (
        "from megatron_dsrl.rewards.sandbox import Limits, run_program\n"
        f"run_program('import time; time.sleep(60)', Limits(wall_seconds=60.0), isolated={isolated})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    caller = psutil.Popen([sys.executable, "-c", script], env=environment)
    wait_until(lambda: len(caller.children(recursive=True)) >= 3, 60)
    family = caller.children(recursive=True)
    caller.kill()
    caller.wait()
    assert psutil.wait_procs(family, timeout=20)[1] == []
    left = list(tmp_path.iterdir())
    assert len(left) == (0 if isolated else 1)
    for folder in left:
        _make_old(folder)
    run_in(tmp_path, "pass")
    assert list(tmp_path.iterdir()) == []


def _make_old(folder: Path) -> None:
    then = time.time() - 2 * NEW_SECONDS
    os.utime(folder, (then, then))


def run_in(folder: Path, program: str) -> Outcome:
    """Run a program unsafely with its temporary folder in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        return run_program(program, LIMITS, isolated=False)


def test_folders_in_use_are_kept(tmp_path: Path) -> None:
    mine = tmp_path / f"{PREFIX}mine"
    mine.mkdir()
    _make_old(mine)
    descriptor = os.open(mine, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run_in(tmp_path, "pass").passed
    assert list(tmp_path.iterdir()) == [mine]
    os.close(descriptor)


@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')",
        "import os\nos.makedirs('closed/inner')\nos.chmod('closed/inner', 0)\nos.chmod('closed', 0)",
    ],
)
def test_folders_of_any_depth_and_permissions_are_removed(program: str, tmp_path: Path) -> None:
    assert run_in(tmp_path, program).passed
    assert list(tmp_path.iterdir()) == []
