"""Whether this machine can isolate programs that a model wrote, and what happens if it cannot."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.temporary_folder import require_temporary_folder
from megatron_dsrl.rewards.registry import Fields
from megatron_dsrl.rewards.sandbox import Limits, run_program

PROBE_LIMITS = Limits(wall_seconds=60.0, folder_bytes=2**20, folder_files=16, threads=4)
PROBE = f"""
import ctypes, decimal, hashlib, os, socket, threading, time, zlib

def fill():
    for name in ("first", "second"):
        with open(name, "wb") as file:
            file.write(bytes({PROBE_LIMITS.folder_bytes * 3 // 4}))

def crowd():
    for _ in range({PROBE_LIMITS.threads * 2}):
        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()

def has_to_fail(what, action, *arguments):
    try:
        action(*arguments)
    except (OSError, RuntimeError):
        return
    raise RuntimeError(f"despite isolation, a program {{what}}")

has_to_fail("starts processes", os.fork)
has_to_fail("opens sockets", socket.socket, socket.AF_UNIX)
has_to_fail("changes the permissions of files outside its folder", os.chmod, "/usr", 0o755)
has_to_fail("reads files outside its folder", open, "/etc/passwd")
has_to_fail("fills the disk", fill)
has_to_fail("starts any number of threads", crowd)
"""
ADVICE = (
    "In a container, permit user namespaces and mounts (docker run --security-opt seccomp=unconfined --security-opt "
    "apparmor=unconfined, or --privileged); on a machine, permit unprivileged user namespaces (sysctl)"
)


@cache
def missing_isolation() -> str | None:
    """Why programs cannot be isolated on this machine; None if they can. Tries it with a program once per process."""
    try:
        require_temporary_folder()
        outcome = run_program(PROBE, PROBE_LIMITS)
    except UserError as error:
        return str(error)
    return None if outcome.passed else outcome.reason


def check_isolation(options: Mapping[str, Any], fields: Fields) -> None:
    """Raise UserError if programs of `code` cannot be isolated here and its options do not allow unsafe ones."""
    require_isolation(
        f"{fields.function}: `code`", bool(options.get("allow_unsafe")), "or judge on another machine with `remote`; "
    )


def require_isolation(who: str, allow_unsafe: bool, alternative: str = "") -> bool:
    """Whether programs run isolated here. Raises UserError if they cannot, and unsafe ones are not allowed; `who` runs
    them and `alternative` is additional advice, both for the message."""
    problem = missing_isolation()
    if problem is not None and not allow_unsafe:
        raise UserError(
            f"{who} runs programs that a model wrote, and this machine cannot isolate them: {problem}. {ADVICE}; "
            f"{alternative}or accept that programs can reach your files with the option allow_unsafe: true"
        )
    return problem is None


def describe_isolation(options: Mapping[str, Any]) -> str:
    """How `code` runs programs on this machine, for the line at a run's start and its record."""
    problem = missing_isolation()
    if problem is None:
        return "code: programs are isolated"
    if options.get("allow_unsafe"):
        return f"code: programs run UNSAFELY (allow_unsafe) and can reach your files: {problem}"
    return f"code: programs are refused: {problem}"
