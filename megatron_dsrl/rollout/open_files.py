"""The limit of open files, which limits the number of requests in flight: each has a connection."""

import logging
import os
import resource

from megatron_dsrl.common.errors import UserError

logger = logging.getLogger(__name__)

RESERVED = 64
"""Descriptors kept for everything but requests: checkpoints, logs, new reward workers, health checks, weight pushes."""
FEWEST_REQUESTS = 16


class TooManyOpenFilesError(UserError):
    """This process or machine is out of file descriptors. No engine is to blame."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"{error.strerror}: the limit of open files is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} for this "
            "process; raise it (`ulimit -n 65536` in the shell, or LimitNOFILE of the service)"
        )


def requests_at_a_time() -> int:
    """Number of requests that this process can have in flight, given the files that it has open.

    The soft limit is first raised to the hard limit: the usual 1,024 is meant for programs that use `select`.

    Raises:
        UserError: the limit leaves room for too few requests.
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


def warn_of_few_requests(limit: int) -> None:
    """Say that requests wait for file descriptors and not for engines."""
    logger.warning(
        "the limit of open files (`ulimit -n` = %d) lets only %d requests run at a time; raise it so that engines do "
        "not wait",
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        limit,
    )
