"""Join the processes that `--processes`, torchrun or srun started."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import launched_rank

FIRST_RANK_LIMIT = timedelta(minutes=30)
"""Limit for rank 0 to start: on a cluster its node may still be loading the container."""
CONNECT_SECONDS = 1.0
SHORTEST_PAUSE_SECONDS = 0.005
LONGEST_PAUSE_SECONDS = 0.5


def join_processes(backend: str, timeout: timedelta, first_rank_limit: timedelta = FIRST_RANK_LIMIT) -> None:
    """`init_process_group` for launched processes, which need not reach it at the same moment.

    torch's client sleeps half a second or more whenever rank 0's store is not there yet; here the other ranks look for
    it at short intervals first.

    Args:
        backend: as for `init_process_group`.
        timeout: limit for the other ranks to join, and for each collective later.
        first_rank_limit: limit for rank 0's store to appear.

    Raises:
        UserError: the environment does not say where rank 0 is, or rank 0 cannot be reached in time.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set, but not {' and '.join(missing)}: start with --processes, torchrun or slurm/*.sh")
    if launched_rank() != 0:
        _wait_for_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), first_rank_limit)
    dist.init_process_group(backend, timeout=timeout)


def _wait_for_store(host: str, port: int, limit: timedelta) -> None:
    started = time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
            return
        except OSError as error:
            waited = time.monotonic() - started
            if waited > limit.total_seconds():
                raise UserError(
                    f"rank {launched_rank()} cannot reach rank 0 at {host}:{port} ({error.strerror or error}) after "
                    f"{waited:.0f} s: see whether rank 0 has started, and whether a firewall is between them"
                ) from error
            # A tenth of the time waited so far: thousands of ranks must not flood rank 0 during a long start.
            time.sleep(min(max(waited / 10, SHORTEST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS))
