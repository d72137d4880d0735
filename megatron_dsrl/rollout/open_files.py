"""The limit of open files, which limits the number of requests in flight: each has a connection."""

import logging
import os
import resource

from megatron_dsrl.common.errors import UserError

logger = logging.getLogger(__name__)

RESERVED = 64
"""Descriptors kept for everything but requests: checkpoints, logs, new reward workers, health checks, weight pushes."""
FEWEST_REQUESTS = 16
REQUESTS_WITHOUT_FILES = 10
"""Requests in a row that may find no file descriptor while none is in flight before that is an error."""


class TooManyOpenFilesError(UserError):
    """This process or machine is out of file descriptors. No engine is to blame."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"{error.strerror}: the limit of open files is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} for this "
            "process; raise it (`ulimit -n 65536` in the shell, or LimitNOFILE of the service)"
        )


def requests_at_a_time() -> int:
    """Number of requests that this process can have in flight, given the files that it has open.

    The soft limit is first raised to the hard limit: the usual 1,024 is meant for programs that use `select`. Raises
    UserError if the limit leaves room for too few requests.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    is_open = len(os.listdir("/proc/self/fd"))
    free = hard - is_open - RESERVED
    if hard != resource.RLIM_INFINITY and free < FEWEST_REQUESTS:
        raise UserError(
            f"the limit of open files (`ulimit -n`) is {hard}; {is_open} are in use and {RESERVED} are "
            f"reserved: no room for requests to the engines. Raise it to {is_open + RESERVED + 1024} or more"
        )
    return 2**31 if hard == resource.RLIM_INFINITY else free


class RequestLimit:
    """How many requests may be in flight: as many as open files allow, and fewer once one found no descriptor."""

    def __init__(self) -> None:
        self._most = requests_at_a_time()
        self._has_warned = False
        self._failures = 0
        """Requests that found no file descriptor since the last that did."""

    def is_reached(self, in_flight: int) -> bool:
        """Whether more requests must wait. Warns the first time that they must."""
        if in_flight < self._most:
            return False
        if not self._has_warned:
            logger.warning(
                "the limit of open files (`ulimit -n` = %d) lets only %d requests run at a time; raise it so that "
                "engines do not wait",
                resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                self._most,
            )
        self._has_warned = True
        return True

    def request_answered(self) -> None:
        self._failures = 0

    def request_failed(self, in_flight: int, error: TooManyOpenFilesError) -> None:
        """Note that a request found no file descriptor; from now on no more than `in_flight` run at a time. Raises the
        error if not even a single request has found one for a while."""
        self._failures += 1
        if not in_flight and self._failures >= REQUESTS_WITHOUT_FILES:
            raise error
        self._most = max(1, min(self._most, in_flight))
