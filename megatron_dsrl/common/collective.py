"""Small collectives on Python objects, which also work without torch.distributed.

Everything but `rank`, `world_size` and `my_share` is collective: every process (of the group) must call it, in the same
order. Values are pickled.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megatron_dsrl.common.errors import UserError

Value = TypeVar("Value")


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
    """Every process's value in rank order, on every process.

    Args:
        group: participating processes; None for all.
    """
    size = world_size() if group is None else group.size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def gather_within(group: dist.ProcessGroup | None, value: Value) -> list[Value]:
    """As `gather`, but without a group this process is alone."""
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
    """Run `work` on every process; all processes get all results, or raise the first failure.

    Args:
        work: must not be collective itself.

    Returns:
        The results in rank order.

    Raises:
        UserError: `work` failed on another process. A failure on this process is raised unchanged.
    """
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
