"""Small agreements between processes, which hold trivially where torch.distributed does not run."""

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


def from_first(value: Value | None) -> Value:
    """Rank 0's value, on every process; what the others pass is not looked at."""
    if world_size() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def raise_everywhere(problem: str | None) -> None:
    """Raise on every process if one has a problem: the first in rank order.

    Raises:
        UserError: the problem.
    """
    problems = [text for text in gather(problem) if text]
    if problems:
        raise UserError(problems[0])
