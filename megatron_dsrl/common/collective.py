"""Small collectives on Python objects, which also work without torch.distributed, and how launched processes join.

Everything but `rank`, `world_size` and `my_share` is collective: every process (of the group) must call it, in the same
order. Values are pickled.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import launched_rank

Value = TypeVar("Value")

FIRST_RANK_LIMIT = timedelta(minutes=30)
"""Limit for rank 0 to start: on a cluster its node may still be loading the container."""
CONNECT_SECONDS = 1.0
SHORTEST_PAUSE_SECONDS = 0.005
LONGEST_PAUSE_SECONDS = 0.5


def rank() -> int:
    """Rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def gather(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Every process's value in rank order, on every process of the group; None means all."""
    size = world_size() if group is None else group.size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def gather_within(group: dist.ProcessGroup | None, value: Value) -> list[Value]:
    """Like `gather`, but if the group is None, only this process's value."""
    return [value] if group is None else gather(value, group)


def broadcast(value: Value) -> Value:
    """Rank 0's value, on every process; other ranks' values are ignored."""
    if world_size() == 1:
        return value
    values: list[Any] = [value if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def my_share(items: Sequence[Value]) -> Sequence[Value]:
    """This rank's share of the items, dealt out round-robin. Not collective."""
    return items[rank() :: world_size()]


def first_problem(problem: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The message of the lowest rank that has one, on every process; None if no rank has one."""
    return next((each for each in gather(problem, group) if each is not None), None)


def together(work: Callable[[], Value]) -> list[Value]:
    """Run `work`, which must not be collective itself, on every process; all get all results in rank order, or raise
    the first failure: this process's own unchanged, another's as UserError."""
    result: Any = None
    failure: Exception | None = None
    problem: str | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
        problem = str(error) if isinstance(error, UserError) else f"process {rank()}: {type(error).__name__}: {error}"
    outcomes = gather((problem, result))
    if failure is not None:
        raise failure
    for problem, _ in outcomes:
        if problem is not None:
            raise UserError(problem)
    return [result for _, result in outcomes]


def on_first(work: Callable[[], Value]) -> Value:
    """Run `work` on rank 0; every process gets its result, or raises its failure as `together` does."""
    return cast(Value, together(lambda: work() if rank() == 0 else None)[0])


def join_processes(backend: str, timeout: timedelta, first_rank_limit: timedelta = FIRST_RANK_LIMIT) -> None:
    """`init_process_group` for launched processes, which need not reach it at the same moment.

    torch's client sleeps half a second or more whenever rank 0's store is not there yet; here the other ranks look for
    it at short intervals first. Raises UserError if the environment does not say where rank 0 is, or rank 0 cannot be
    reached in time.

    Args:
        timeout: limit for the other ranks to join, and for each collective later.
        first_rank_limit: limit for rank 0's store to appear.
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
                    f"{waited:.0f} s: check that rank 0 has started and that no firewall is between them"
                ) from error
            # A tenth of the time waited so far: thousands of ranks must not flood rank 0 during a long start.
            time.sleep(min(max(waited / 10, SHORTEST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS))
