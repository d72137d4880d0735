"""Separate namespaces and a separate root file system for the sandbox's processes. Standard library only.

The new root holds Python's files, `/usr` and a few devices, read-only, and one folder of limited size in memory. No
other path exists, so no file, metadata or Unix socket outside can be reached. The network is unavailable, even
loopback, and other processes are invisible.
"""

import ctypes
import os
from collections.abc import Callable

from sandbox_kernel import exposed_paths, libc, succeed

FOLDER = "/sandbox"
"""The program's folder, the only one that it can write to."""

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1 << 1, 1 << 2, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MOUNT_SETATTR = 442  # the same on every architecture
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
OLD_ROOT = "/old"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class MountAttributes(ctypes.Structure):
    """`struct mount_attr`."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def enter_namespaces(mount_point: str, folder_bytes: int, folder_files: int) -> Callable[[], None]:
    """Isolate this process and its later children; the first child is the first process of its process namespace.

    `mount_point` is any existing folder; it is covered for these processes only. `folder_bytes` and `folder_files`
    limit the content of `FOLDER`, and the number of its files and folders. Raises OSError, which names the step, if the
    kernel does not permit it.

    Returns a function that the first child calls to become an ordinary user.
    """
    apart = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    is_administrator = user == 0 and libc.unshare(apart) == 0
    if not is_administrator:
        succeed(libc.unshare(CLONE_NEWUSER | apart), "user namespace")
        maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"}
        for file, content in maps.items():
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(content)
    user = new_user() if is_administrator else NOBODY
    change_root(mount_point, folder_bytes, folder_files)
    os.chown(FOLDER, user, user)

    def become_user() -> None:
        if is_administrator:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)

    return become_user


def new_user() -> int:
    """A random user id, so that the kernel counts its processes apart from all others. Raises OSError if this process
    may use no user id but 0."""
    with open("/proc/self/uid_map") as file:
        first, _, count = max(tuple(map(int, line.split())) for line in file)
    user = first + count // 2 + int.from_bytes(os.urandom(4), "little") % (count - count // 2)
    if user == 0:
        raise PermissionError("only the user id 0 exists here")
    return user


def change_root(mount_point: str, folder_bytes: int, folder_files: int) -> None:
    """Build the new root on `mount_point`, make it the root and detach the old one."""
    real_paths = {path: os.path.realpath(path) for path in exposed_paths()}
    os.umask(0o022)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", mount_point, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    os.chdir(mount_point)
    os.mkdir(OLD_ROOT[1:])
    number = PIVOT_ROOT[os.uname().machine]
    succeed(libc.syscall(number, b".", OLD_ROOT[1:].encode()), "pivot_root")
    os.chdir("/")
    bound: list[str] = []
    for path, real in sorted((*real_paths.items(), *((real, real) for real in real_paths.values()))):
        if not any(path == other or path.startswith(f"{other}/") for other in bound):
            bind_read_only(OLD_ROOT + real, path, MOUNT_ATTR_NODEV)
            bound.append(path)
    for path in DEVICES:
        bind_read_only(OLD_ROOT + path, path, 0)
    os.mkdir(FOLDER)
    mount("tmpfs", FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, f"size={folder_bytes},nr_inodes={folder_files},mode=700")
    succeed(libc.umount2(OLD_ROOT.encode(), MNT_DETACH), "umount of the old root")
    os.rmdir(OLD_ROOT)
    set_attributes("/", MOUNT_ATTR_RDONLY, recursive=False)
    os.chdir(FOLDER)


def bind_read_only(source: str, target: str, attributes: int) -> None:
    """Show a file or folder of the old root at `target`."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_RDONLY, 0o644))
    mount(source, target, None, MS_BIND | MS_REC)
    set_attributes(target, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | attributes, recursive=True)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    result = libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    succeed(result, f"mount of {source or 'nothing'} on {target}")


def set_attributes(target: str, attributes: int, recursive: bool) -> None:
    """Set attributes of a mount, and of those below it if recursive."""
    wanted = MountAttributes(set=attributes)
    size, flags = ctypes.c_size_t(ctypes.sizeof(wanted)), AT_RECURSIVE if recursive else 0
    result = libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, ctypes.byref(wanted), size)
    succeed(result, f"mount_setattr of {target}")
