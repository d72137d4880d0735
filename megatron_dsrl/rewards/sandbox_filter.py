"""The system calls that a program in the sandbox may make, as a seccomp filter built by libseccomp.

A call that is not listed fails with EPERM. The list covers what Python, its standard library and threads need for
files, memory, time and their own signals. Not listed, among others: sockets except connected pairs, starting processes
and programs, signals to other processes, tracing, mounts, namespaces, memory that no limit counts (`memfd_create`,
System V shared memory), extended attributes, keys, io_uring, BPF.
"""

import ctypes
import errno
import os
from functools import cache

from megatron_dsrl.common.errors import UserError

ALLOW, FAIL = 0x7FFF0000, 0x00050000  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(0)
MASKED_EQUAL = 7  # SCMP_CMP_MASKED_EQ
UNKNOWN = -1  # __NR_SCMP_ERROR
LOW_WORD = 0xFFFFFFFF
CLONE_THREAD = 0x00010000
CLONE_NAMESPACES = 0x7E020080

FILES = """
    open openat openat2 creat close close_range read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2
    lseek stat fstat lstat newfstatat statx access faccessat faccessat2 statfs fstatfs getdents getdents64 getcwd chdir
    fchdir mkdir mkdirat rmdir rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat readlink
    readlinkat truncate ftruncate fallocate fadvise64 fsync fdatasync flock chmod fchmod fchmodat fchmodat2 umask
    utime utimes futimesat utimensat dup dup2 dup3 fcntl pipe pipe2 sendfile copy_file_range poll ppoll select pselect6
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2
"""
MEMORY = "brk mmap munmap mremap mprotect madvise msync mincore"
TIME = """
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times alarm getitimer setitimer pause
"""
IDENTITY = """
    getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid getresgid getpgrp getpgid getsid uname
    sysinfo getrusage getrlimit setrlimit getrandom getcpu getpriority capget
"""
THREADS = """
    futex futex_waitv set_robust_list get_robust_list set_tid_address rseq membarrier arch_prctl sched_yield
    sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_min sched_get_priority_max exit exit_group
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack restart_syscall
    tgkill tkill wait4 waitid
"""
PAIRED_SOCKETS = "sendto recvfrom shutdown getsockopt getsockname getpeername"
"""The peer of a stream socket pair is fixed, so an address has no effect; asyncio's event loop has such a pair."""
EXTENDED_ATTRIBUTES = """
    listxattr llistxattr flistxattr getxattr lgetxattr fgetxattr setxattr lsetxattr fsetxattr
    removexattr lremovexattr fremovexattr
"""

Argument = tuple[int, int, int]
"""Number of the argument, mask, value under the mask."""

RESTRICTED: tuple[tuple[str, tuple[Argument, ...]], ...] = (
    ("clone", ((0, CLONE_THREAD | CLONE_NAMESPACES, CLONE_THREAD),)),  # a thread, not a process
    ("socketpair", ((0, LOW_WORD, 1), (1, 0xF, 1))),  # AF_UNIX, SOCK_STREAM
    ("prlimit64", ((0, LOW_WORD, 0),)),  # of this process
    *(("prctl", ((0, LOW_WORD, option),)) for option in (15, 16, 0x53564D41)),  # names of threads and memory
    *(("ioctl", ((1, LOW_WORD, request),)) for request in (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)),
    # TCGETS (isatty), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
)


class Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


@cache
def system_call_filter() -> bytes:
    """The filter as instructions of classic BPF for this machine. Raises UserError if libseccomp is not installed or
    too old."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise UserError(
            f"the sandbox needs libseccomp (package libseccomp2 on Debian and Ubuntu, libseccomp elsewhere): {error}"
        ) from error
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(FAIL | errno.EPERM))
    try:
        for name in f"{FILES} {MEMORY} {TIME} {IDENTITY} {THREADS} {PAIRED_SOCKETS}".split():
            _add(library, context, ALLOW, name)
        for name, arguments in RESTRICTED:
            _add(library, context, ALLOW, name, arguments)
        _add(library, context, FAIL | errno.ENOSYS, "clone3")  # then glibc uses clone; a filter can read its flags
        for name in EXTENDED_ATTRIBUTES.split():
            _add(library, context, FAIL | errno.ENOTSUP, name)  # `shutil.copy2` then works without them
        with open(os.memfd_create("filter"), "w+b") as file:
            _check(library.seccomp_export_bpf(context, file.fileno()), "seccomp_export_bpf")
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def _add(
    library: ctypes.CDLL, context: ctypes.c_void_p, action: int, name: str, arguments: tuple[Argument, ...] = ()
) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number == UNKNOWN:  # newer than this libseccomp
        return
    comparisons = [Comparison(index, MASKED_EQUAL, mask, value) for index, mask, value in arguments]
    array = (Comparison * len(comparisons))(*comparisons)
    result = library.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(comparisons), array)
    _check(result, f"seccomp_rule_add of {name}")


def _check(result: int, attempt: str) -> None:
    if result < 0:
        raise UserError(f"the sandbox needs libseccomp 2.5 or newer: {attempt}: {os.strerror(-result)}")
