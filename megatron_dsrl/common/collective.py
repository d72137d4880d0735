"""Small agreements between processes, which hold trivially where torch.distributed does not run.

Everything but `rank` and `world_size` is collective: every process (of the group) calls it, in the same order. Values
are Python objects; they are pickled.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from megatron_dsrl.common.errors import UserError

Value = TypeVar("Value")


def rank() -> int:
    """Of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def gather(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Every process's value in rank order, on every process.

    Args:
        value: of this process.
        group: processes that take part; None for all.
    """
    size = world_size() if group is None else group.size()
    if size == 1:
        return [value]
    values: list = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Value) -> Value:
    """Rank 0's value, on every process; what the others pass is not looked at."""
    if world_size() == 1:
        return value
    values = [value if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def my_share(items: Sequence[Value]) -> Sequence[Value]:
    """Every world-size-th item, beginning with this process's. Not collective."""
    return items[rank() :: world_size()]


def first_problem(problem: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The message of the lowest rank that has one, on every process; None if none has."""
    return next((each for each in gather(problem, group) if each is not None), None)


def together(work: Callable[[], Value]) -> list[Value]:
    """Do this process's part of something; every process learns of all parts, or of the first failure among them.

    Args:
        work: must not be collective itself.

    Returns:
        What each process's part returned, in rank order.

    Raises:
        UserError: the part of another process failed. A failure of its own is raised as it is.
    """
    result, failure, problem = None, None, None
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
    """Let rank 0 do something; every process gets its result or its failure, as with `together`."""
    return together(lambda: work() if rank() == 0 else None)[0]
