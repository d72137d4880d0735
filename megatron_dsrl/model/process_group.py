"""A process group over torchrun's processes, for commands that do not build a Megatron model."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron_dsrl.model.parallel import world_size_from_environment
from megatron_dsrl.platform import current_platform

LIMIT = timedelta(days=14)
"""Limit for waiting on rank 0, which may sample for a long time."""


@contextmanager
def process_group() -> Iterator[None]:
    """Select each process's device and, if there are several processes, join a gloo group until the end of the
    block."""
    several = world_size_from_environment() > 1 and not dist.is_initialized()
    if several:
        dist.init_process_group("gloo", timeout=LIMIT)
    if current_platform().name == "cuda":
        current_platform().install()
    try:
        yield
    finally:
        if several:
            dist.destroy_process_group()
