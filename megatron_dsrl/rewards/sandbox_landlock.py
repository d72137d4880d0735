"""Landlock for programs that run without namespaces. Standard library only.

Python's files can be read, the folder can be written, nothing else can be opened. Metadata of other files can still be
read and changed.
"""

import ctypes
import os
import sys

from sandbox_kernel import libc

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
RULE_PATH_BENEATH = 1
FIRST_WITH_TRUNCATE = 3
FILE_ACCESS_BITS = {3: 15, 4: 15}  # bits of linux/landlock.h by ABI; 16 from ABI 5 on
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3


class PathBeneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def restrict_files(folder: str) -> bool:
    """Apply Landlock; False if the kernel does not support it, or not for truncation."""
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
    for path in {sys.base_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64", "/etc/localtime"}:
        if os.path.exists(path):
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
