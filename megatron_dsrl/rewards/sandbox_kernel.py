"""System calls that Python does not offer, for the sandbox's own processes. Standard library only."""

import ctypes
import os
import resource
import signal

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
BYTES_PER_INSTRUCTION = 8

libc = ctypes.CDLL(None, use_errno=True)


class FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


class CapabilityHeader(ctypes.Structure):
    """`struct __user_cap_header_struct`."""

    _fields_ = [("version", ctypes.c_uint32), ("process", ctypes.c_int)]


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
    """Apply a seccomp filter to this process; it cannot be taken off."""
    program = FilterProgram(len(instructions) // BYTES_PER_INSTRUCTION, instructions)
    succeed(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0), "prctl(PR_SET_SECCOMP)")


def limit(kind: int, value: int) -> None:
    """Lower a resource limit for good."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
