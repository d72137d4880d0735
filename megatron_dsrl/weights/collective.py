"""Small agreements between processes, which hold trivially where torch.distributed does not run."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_dsrl.errors import UserError

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


def gather(value: Value) -> list[Value]:
    """Every process's value in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


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
