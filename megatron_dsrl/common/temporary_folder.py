"""Whether the temporary folder can be used: it must be writable, and the paths of sockets in it are limited (Linux)."""

import os
import tempfile

from megatron_dsrl.common.errors import UserError

LONGEST_SOCKET_PATH = 107
"""Bytes; Linux's `sun_path` has 108, including the final zero."""
LONGEST_NAME = "/torch-shm-dir-xxxxxx/manager.sock"
"""The name that torch's shared memory uses; those of multiprocessing and SGLang are shorter."""


def temporary_folder_problem() -> str | None:
    """What is wrong with the temporary folder, and what to do; None if nothing is."""
    chosen = os.environ.get("TMPDIR")
    if chosen and not os.access(chosen, os.W_OK | os.X_OK):  # Python then takes another folder, but torch does not
        return f"TMPDIR: {chosen} is not a folder that can be written to; set it to one, such as /tmp, or unset it"
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        return f"TMPDIR: {error.strerror}; set it to a folder that can be written to"
    limit = LONGEST_SOCKET_PATH - len(LONGEST_NAME)
    length = len(os.fsencode(folder))
    if length <= limit:
        return None
    return (
        f"TMPDIR: {folder} has {length} bytes, but at most {limit} leave room for the names of the sockets that reward "
        "workers and engines need; set it to a shorter local folder, such as /tmp"
    )


def require_temporary_folder() -> None:
    """Raise UserError if the temporary folder cannot be written to, or its name is too long."""
    if problem := temporary_folder_problem():
        raise UserError(problem)
