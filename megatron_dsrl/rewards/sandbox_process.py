"""The sandbox's process: restricts itself, runs the program and its tests, reports the result. Standard library only.

Started by `sandbox.py` as a script. Settings are JSON in the first argument; standard input has two lines of JSON, the
program, and the tests with the token. Program and tests have separate processes: the program's is forked before the
second line is read, and keeps neither standard input nor the result pipe. So it knows neither the tests nor the token,
and only plain data gets from it to the tests (`sandbox_call.py`).

Restrictions, from the outside to the inside:

1. resource limits (`setrlimit`) and death with the parent, always;
2. user, network, process and IPC namespaces (`unshare`): no network at all, not even loopback; the tests' process is
   the first of its namespace, so that everything the program started dies with it;
3. Landlock: Python's own files can be read, the folder can be written, nothing else can be opened; no TCP. The
   program's process has a second layer of it, and so cannot trace the tests' process;
4. only if 2 or 3 is not permitted: an audit hook in the program's interpreter, which refuses sockets, new processes,
   foreign functions, and files outside the folder. It is weaker: code that escapes from Python escapes from it.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable

sys.path.append(os.path.dirname(__file__))
from sandbox_call import Caller, ProgramError, serve  # noqa: E402  (the script's folder is not on the path under -I)

del sys.path[-1]

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on x86-64 and arm64
LANDLOCK_RULE_PATH_BENEATH = 1
FILE_ACCESS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # bits of linux/landlock.h by ABI; 16 from ABI 5 on
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1

libc = ctypes.CDLL(None, use_errno=True)


class RulesetAttributes(ctypes.Structure):
    """`struct landlock_ruleset_attr` up to ABI 4."""

    _fields_ = [("handled_access_fs", ctypes.c_uint64), ("handled_access_net", ctypes.c_uint64)]


class PathBeneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def main() -> None:
    """Read the task, apply the outer restrictions, and exit with the status of the tests' process."""
    settings = json.loads(sys.argv[1])
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # a buffer would be inherited by the program's process
        program = json.loads(stdin.readline())["program"]
    sys.set_int_max_str_digits(0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    limit_resources(settings)
    isolation = ["namespaces"] if enter_namespaces() else []
    child = os.fork()  # the first process of the new namespace
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _limit(resource.RLIMIT_NPROC, settings["processes"])
        isolation += ["landlock"] if restrict_files(settings["folder"]) else []
        split(program, settings, isolation)
    _, status = os.waitpid(child, 0)
    end_orphans()
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def limit_resources(settings: dict) -> None:
    """Set limits that children inherit and that cannot be raised again."""
    _limit(resource.RLIMIT_AS, settings["memory_bytes"])
    _limit(resource.RLIMIT_CPU, settings["cpu_seconds"])
    _limit(resource.RLIMIT_FSIZE, settings["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_CORE, 0)


def enter_namespaces() -> bool:
    """Isolate this process from the network and other processes; False if the kernel does not permit it."""
    apart = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    return libc.unshare(CLONE_NEWUSER | apart) == 0 or libc.unshare(apart) == 0


def restrict_files(folder: str) -> bool:
    """Apply Landlock; False if the kernel does not support it."""
    abi = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    everything = (1 << FILE_ACCESS_BITS.get(abi, 16)) - 1
    attributes = RulesetAttributes(everything, BIND_TCP | CONNECT_TCP if abi >= 4 else 0)
    size = ctypes.sizeof(attributes) if abi >= 4 else 8
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    allowed = [_allow(ruleset, folder, everything)]
    for path in ("/dev/null", "/dev/zero", "/dev/urandom"):
        _allow(ruleset, path, READ_FILE | WRITE_FILE)
    for path in {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc/localtime"}:
        if os.path.exists(path):
            _allow(ruleset, path, EXECUTE | READ_FILE | (READ_DIR if os.path.isdir(path) else 0))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return all(allowed) and libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0


def split(program: str, settings: dict, isolation: list) -> None:
    """Fork the program's process, judge it in this one, and exit."""
    requests_read, requests = os.pipe()
    answers, answers_write = os.pipe()
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for descriptor in (settings["result"], requests, answers):
            os.close(descriptor)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        run(program, settings, isolation, requests_read, answers_write)
    os.close(requests_read)
    os.close(answers_write)
    judge(Caller(child, open(requests, "wb"), open(answers, "rb")), settings, isolation)


def run(program: str, settings: dict, isolation: list, requests: int, answers: int) -> None:
    """Run the program, answer calls of its function, and exit."""
    os.chdir(settings["folder"])
    if "landlock" in isolation:
        restrict_files(settings["folder"])
    if len(isolation) < 2:
        sys.addaudithook(refusals(settings["folder"]))
    leave = os._exit

    def load() -> Callable[..., object] | None:
        namespace: dict[str, object] = {"__name__": "__main__"}
        exec(compile(program, "<program>", "exec"), namespace)
        function = namespace.get(settings["entry_point"])
        return function if callable(function) else None

    serve(load, open(requests, "rb"), open(answers, "wb"))
    leave(0)


def judge(candidate: Caller, settings: dict, isolation: list) -> None:
    """Run the tests, write the verdict, and exit. The token proves that the sandbox wrote it."""
    task = json.loads(sys.stdin.buffer.readline())
    result, token = settings["result"], task["token"]
    os.write(result, f"{token} isolation {' '.join(isolation)}\n".encode())
    try:
        candidate.wait_until_loaded()
        namespace = {"__name__": "__main__"}
        exec(compile(task["preparation"], "<preparation>", "exec"), namespace)
        namespace[settings["entry_point"]] = candidate
        exec(compile(task["tests"], "<tests>", "exec"), namespace)
    except BaseException as error:
        what = str(error) if isinstance(error, ProgramError) else f"{type(error).__name__}: {error}"
        what = what[:500].replace("\n", " ")
        os.write(result, f"{token} {what}\n".encode(errors="replace"))
        os._exit(1)
    os.write(result, f"{token} passed\n".encode())
    os._exit(0)


def refusals(folder: str) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook that raises PermissionError."""
    refused = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "ctypes.")
    readable = tuple(os.path.realpath(path) + os.sep for path in {sys.prefix, sys.base_prefix, "/usr", "/lib"})
    writable = os.path.realpath(folder) + os.sep
    changing = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
                "os.chown", "os.chdir", "shutil.")  # fmt: skip

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"the sandbox refuses {event}")
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not path.startswith(writable) and (writes or not path.startswith(readable)):
                raise PermissionError(f"the sandbox refuses to open {path}")
        elif event.startswith(changing):
            for path in (os.fsdecode(item) for item in arguments if isinstance(item, (str, bytes))):
                if not os.path.realpath(path).startswith(writable):
                    raise PermissionError(f"the sandbox refuses {event} on {path}")

    return hook


def end_orphans() -> None:
    """Kill processes that the program left running. With its own process namespace there are none."""
    children = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(children) and (left := open(children).read().split()):
        for process in left:
            os.kill(int(process), signal.SIGKILL)
            os.waitpid(int(process), 0)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _allow(ruleset: int, path: str, access: int) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    rule = PathBeneath(access, descriptor)
    added = libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    os.close(descriptor)
    return added == 0


if __name__ == "__main__":
    main()
