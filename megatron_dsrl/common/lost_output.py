"""Standard output and error whose reader is gone: a closed pipe, a closed terminal."""

import os
import select
import stat


def leave_closed_pipe() -> bool:
    """Redirect standard output to /dev/null if it is a pipe that nobody reads any more; returns whether it is."""
    output = select.poll()
    output.register(1, 0)
    is_closed = bool(output.poll(0))  # POLLERR is reported without being asked for
    if is_closed:
        _redirect_to_nowhere(1)
    return is_closed


def leave_terminal() -> None:
    """Redirect standard output and error to /dev/null if they are a terminal, which may have been closed (SIGHUP).

    Writing to a closed terminal is an error, which would end the orderly stop of this process.
    """
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            _redirect_to_nowhere(descriptor)


def _redirect_to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
