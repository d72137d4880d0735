"""Git LFS pointers: what `git clone` leaves in place of large files if Git LFS is not installed."""

from pathlib import Path

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def lfs_advice(file: Path) -> str | None:
    """What to do about a file that is only a pointer; None if it is not one."""
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return None
    if not is_pointer:
        return None
    return f"it is a Git LFS pointer, not the file itself; install Git LFS and run `git lfs pull` in {file.parent}"
