"""The length of the temporary folder's name: the paths of the sockets in it are limited (Linux)."""

import os
import tempfile

from megatron_dsrl.common.errors import UserError

LONGEST_SOCKET_PATH = 107
"""Bytes; Linux's `sun_path` has 108, including the final zero."""
LONGEST_NAME = "/torch-shm-dir-xxxxxx/manager.sock"
"""The name that torch's shared memory uses; those of multiprocessing and SGLang are shorter."""


def temporary_folder_problem() -> str | None:
    """What is wrong with the name of the temporary folder, and what to do; None if nothing is."""
    folder = tempfile.gettempdir()
    limit = LONGEST_SOCKET_PATH - len(LONGEST_NAME)
    length = len(os.fsencode(folder))
    if length <= limit:
        return None
    return (
        f"TMPDIR: {folder} has {length} bytes, but at most {limit} leave room for the names of the sockets that reward "
        "workers and engines need; set it to a shorter local folder, such as /tmp"
    )


def require_short_temporary_folder() -> None:
    """Raise UserError if the temporary folder's name is too long."""
    if problem := temporary_folder_problem():
        raise UserError(problem)
