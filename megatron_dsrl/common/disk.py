"""Files that are replaced whole, and error messages for failed writes: a full, read-only or broken disk."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_dsrl.common.errors import UserError

_TORCH_SAVE_FAILURES = ("PytorchStreamWriter", "inline_container", "iostream error")
"""Parts of the message of the RuntimeError that torch.save raises instead of OSError, for example on a full disk."""
NOTHING_PUBLISHED = "Nothing was published, and what was there before is untouched"

FULL_BYTES = 2**16
"""A disk with less than this counts as full."""

_REMEDIES = {
    "fix the permissions, or name another place": (errno.EACCES, errno.EPERM, errno.EROFS),
    "free space, then run the command again": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "correct the path": (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}


def remedy(error: OSError) -> str | None:
    """What a user can do about a file that cannot be used; None if the cause may be a bug."""
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):  # failed writes are never bugs
        return None
    return next((advice for advice, numbers in _REMEDIES.items() if error.errno in numbers), None)


def as_os_error(error: Exception) -> Exception:
    """Convert the RuntimeError of a failed torch.save to OSError; return any other error unchanged."""
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_SAVE_FAILURES):
        return OSError(f"torch.save: {error}")
    return error


def free_space(folder: Path) -> str:
    """` (120 MiB are free there)`, or an empty string if that cannot be determined."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there)"
    except OSError:
        return ""


def is_full(folder: Path) -> bool:
    """Whether the folder's disk has no room for another line; False if that cannot be determined."""
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return False


@contextmanager
def writing(path: Path, what_is_safe: str = NOTHING_PUBLISHED) -> Iterator[None]:
    """Turn a failed write in the body into a message that names the file or folder.

    Args:
        what_is_safe: clause for the message. The default is for folders that are published when complete.

    Raises:
        UserError: instead of OSError, and of the RuntimeError of torch.save.
        KeyboardInterrupt, SystemExit: Ctrl-C or a signal ended the write. torch.save turns them into a RuntimeError.
    """
    handled_before = sys.exception()
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (interrupt := _interrupt_behind(error, handled_before)) is not None:
            raise interrupt from None
        cause = as_os_error(error)
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{path} could not be written{free_space(path.parent)}: {cause}. {what_is_safe}; free space or fix the "
            "permissions, then run the command again"
        ) from error


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Write a file that replaces an existing one whole or not at all: a crash leaves the old content.

    The new file is flushed to disk and takes its name at the end of the block. Links stay links, and anything but a
    regular file, such as /dev/stdout, is written to directly. Every OSError has the file's name.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        with open(file, "wb") as stream:
            yield stream
        return
    file = file.resolve()
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise


def write_result(file: Path, text: str) -> None:
    """Write a text in UTF-8, as `replacing` does, to a folder that is created if it does not exist."""
    make_folder_of(file)
    replace_text(file, text)


def make_folder_of(file: Path) -> None:
    """Create the folder of a file that will be written, and those above it, if they do not exist."""
    if file.parent.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(file.parent))
    file.parent.mkdir(parents=True, exist_ok=True)


def replace_text(file: Path, text: str) -> None:
    """Write a text in UTF-8, as `replacing` does."""
    with replacing(file) as stream:
        stream.write(text.encode())


def _interrupt_behind(error: BaseException, handled_before: BaseException | None) -> BaseException | None:
    """The interrupt that was being raised when `error` replaced it; None if it replaced none."""
    cause = error.__context__
    while cause is not None and cause is not handled_before:
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            return cause
        cause = cause.__context__
    return None
