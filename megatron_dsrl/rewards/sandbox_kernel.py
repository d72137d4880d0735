"""System calls that Python does not offer, for the sandbox's own processes. Standard library only."""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
BYTES_PER_INSTRUCTION = 8
# Landlock
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
RULE_PATH_BENEATH = 1
FIRST_WITH_TRUNCATE = 3
FILE_ACCESS_BITS = {3: 15, 4: 15}  # bits of linux/landlock.h by ABI; 16 from ABI 5 on
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3

libc = ctypes.CDLL(None, use_errno=True)


class FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


class CapabilityHeader(ctypes.Structure):
    """`struct __user_cap_header_struct`."""

    _fields_ = [("version", ctypes.c_uint32), ("process", ctypes.c_int)]


class PathBeneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def succeed(result: int, attempt: str) -> None:
    """Raise OSError with the C library's errno, saying what was attempted, if the result of a call is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{attempt}: {os.strerror(number)}")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. A later change of the user id undoes it."""
    succeed(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has ended."""
    succeed(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def give_up_privileges() -> None:
    """Drop all capabilities for good, and keep processes of the same user from reading this one's memory."""
    header = CapabilityHeader(CAPABILITY_VERSION_3, 0)
    succeed(libc.capset(ctypes.byref(header), (ctypes.c_uint32 * 6)()), "capset")
    succeed(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    succeed(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def restrict_system_calls(instructions: bytes) -> None:
    """Apply a seccomp filter to this process; it cannot be removed."""
    program = FilterProgram(len(instructions) // BYTES_PER_INSTRUCTION, instructions)
    succeed(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0), "prctl(PR_SET_SECCOMP)")


def limit(kind: int, value: int) -> None:
    """Lower a resource limit for good."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def exposed_paths() -> list[str]:
    """Existing paths that programs can read: the interpreter's, the system's libraries and the time zone."""
    paths = {sys.base_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64", "/etc/localtime"}
    return sorted(path for path in paths if os.path.exists(path))


def restrict_files(folder: str) -> bool:
    """Apply Landlock to a program that runs without namespaces; False if the kernel does not support it, or not for
    truncation.

    Python's files can be read, the folder can be written, nothing else can be opened. Metadata of other files can still
    be read and changed.
    """
    abi = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < FIRST_WITH_TRUNCATE:
        return False
    everything = (1 << FILE_ACCESS_BITS.get(abi, 16)) - 1
    handled = ctypes.c_uint64(everything)
    ruleset = libc.syscall(CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    allowed = _allow(ruleset, folder, everything)
    for path in ("/dev/null", "/dev/zero", "/dev/urandom"):
        _allow(ruleset, path, READ_FILE | WRITE_FILE)
    for path in exposed_paths():
        _allow(ruleset, path, READ_FILE | (READ_DIR if os.path.isdir(path) else 0))
    return allowed and libc.syscall(RESTRICT_SELF, ruleset, 0) == 0


def _allow(ruleset: int, path: str, access: int) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    rule = PathBeneath(access, descriptor)
    added = libc.syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    os.close(descriptor)
    return added == 0
