"""The sandbox's processes: they restrict themselves, run the program and its tests, report the result.

Started by `sandbox.py` as a script. Standard library only. Settings are JSON in the first argument; standard input has
two lines of JSON, the program, and the tests with the token. There are three processes, each the parent of the next:

1. this script's first process sets the limits, enters the namespaces, and keeps the time;
2. the tests' process, first of its process namespace, so that everything in there dies with it;
3. the program's process. It is forked before the second line is read, and keeps neither standard input nor the result
   pipe. So it knows neither the tests nor the token, and only plain data gets from it to the tests (`sandbox_call.py`).
   A system call filter lets it start threads but no processes, so its limits hold for the whole program.
"""

import base64
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable

sys.path.append(os.path.dirname(__file__))
import sandbox_kernel  # noqa: E402  (the script's folder is not on the path under -I)
from sandbox_call import Caller, ProgramError, serve  # noqa: E402
from sandbox_namespaces import enter_namespaces  # noqa: E402

del sys.path[-1]

TIMED_OUT = 124
"""Exit status after the time limit, like that of timeout(1)."""

LONGEST_REPORT = 10_000
"""Characters; encoded, they fit into the result pipe, which is read when everything has ended."""


def main() -> None:
    """Read the program, apply the outer restrictions, and exit with the status of the tests' process."""
    settings = json.loads(sys.argv[1])
    sys.set_int_max_str_digits(0)
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # a buffer would be inherited by the program's process
        program = json.loads(stdin.readline())["program"]
    limit_resources(settings)
    become_user = isolate(settings) if settings["isolated"] else lambda: None
    sandbox_kernel.adopt_orphans()
    sandbox_kernel.die_with_parent()
    if os.getppid() != settings["parent"]:
        os._exit(1)
    child = os.fork()
    if child == 0:
        become_user()
        sandbox_kernel.die_with_parent()
        sandbox_kernel.give_up_privileges()
        if settings["isolated"]:
            sandbox_kernel.limit(resource.RLIMIT_NPROC, settings["threads"] + 2)  # and the sandbox's own processes
        else:
            sandbox_kernel.restrict_files(settings["folder"])
        split(program, settings)
    os._exit(wait(child, settings["deadline"]))


def limit_resources(settings: dict) -> None:
    """Set limits that children inherit and that cannot be raised again."""
    sandbox_kernel.limit(resource.RLIMIT_AS, settings["memory_bytes"])
    sandbox_kernel.limit(resource.RLIMIT_CPU, settings["cpu_seconds"])
    sandbox_kernel.limit(resource.RLIMIT_FSIZE, settings["folder_bytes"])
    sandbox_kernel.limit(resource.RLIMIT_NOFILE, 64)
    sandbox_kernel.limit(resource.RLIMIT_CORE, 0)


def isolate(settings: dict) -> Callable[[], None]:
    """Enter the namespaces; if the kernel does not permit it, report that and exit before the program is started."""
    try:
        return enter_namespaces(settings["mount_point"], settings["folder_bytes"], settings["folder_files"])
    except (OSError, KeyError) as error:
        os.write(settings["result"], f"{settings['refused']} {error}\n".encode(errors="replace"))
        os._exit(1)


def wait(child: int, deadline: float) -> int:
    """Wait for the tests' process, or kill it at the deadline (`time.monotonic`); returns the status to exit with."""
    ended, _, _ = select.select([os.pidfd_open(child)], [], [], max(0.0, deadline - time.monotonic()))
    if not ended:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF
    try:
        while True:
            os.waitpid(-1, 0)  # the program's process, which the kernel kills with its parent
    except ChildProcessError:
        return status if ended else TIMED_OUT


def split(program: str, settings: dict) -> None:
    """Fork the program's process, judge it in this one, and exit."""
    requests_read, requests = os.pipe()
    answers, answers_write = os.pipe()
    child = os.fork()
    if child == 0:
        sandbox_kernel.die_with_parent()
        os.setsid()  # signals to its process group reach nothing else
        for descriptor in (settings["result"], requests, answers):
            os.close(descriptor)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        run(program, settings, requests_read, answers_write)
    os.close(requests_read)
    os.close(answers_write)
    judge(Caller(child, open(requests, "wb"), open(answers, "rb")), settings)


def run(program: str, settings: dict, requests: int, answers: int) -> None:
    """Run the program, answer calls of its function, and exit."""
    os.chdir(settings["folder"])
    sandbox_kernel.restrict_system_calls(base64.b64decode(settings["filter"]))
    leave = os._exit

    def load() -> Callable[..., object] | None:
        namespace: dict[str, object] = {"__name__": "__main__"}
        exec(compile(program, "<program>", "exec"), namespace)
        function = namespace.get(settings["entry_point"])
        return function if callable(function) else None

    serve(load, open(requests, "rb"), open(answers, "wb"))
    leave(0)


def judge(candidate: Caller, settings: dict) -> None:
    """Run the tests, write the verdict and their `report`, and exit. The token proves that the sandbox wrote it."""
    task = json.loads(sys.stdin.buffer.readline())
    result, token = settings["result"], task["token"]
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
    report = namespace.get("report")
    text = report[:LONGEST_REPORT] if isinstance(report, str) else ""
    encoded = base64.b64encode(text.encode(errors="replace")).decode()
    os.write(result, f"{token} passed {encoded}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
