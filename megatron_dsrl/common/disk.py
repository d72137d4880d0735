"""A disk that takes no more: full, read-only, or broken."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dsrl.common.errors import UserError

_TORCH_SAVE_FAILURES = ("PytorchStreamWriter", "inline_container", "iostream error")
"""In messages of the RuntimeError that torch.save raises in place of OSError, on a full disk for example."""
NOTHING_PUBLISHED = "Nothing was published, and what was there before is untouched"


def as_os_error(error: Exception) -> Exception:
    """An OSError for what torch.save raises in its place; any other error as it is."""
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_SAVE_FAILURES):
        return OSError(f"torch.save: {error}")
    return error


def free_space(folder: Path) -> str:
    """` (120 MiB are free there)`; nothing where that cannot be found out."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there)"
    except OSError:
        return ""


@contextmanager
def writing(path: Path, what_is_safe: str = NOTHING_PUBLISHED) -> Iterator[None]:
    """Name the file where writing it fails in the body.

    Args:
        path: file or folder that is written.
        what_is_safe: a clause for the message. The default is for folders that are published when they are complete.

    Raises:
        UserError: in place of OSError, and of the RuntimeError of torch.save.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = as_os_error(error)
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{path} could not be written{free_space(path.parent)}: {cause}. {what_is_safe}; free space or fix the "
            "permissions, and start the command again"
        ) from error
