"""torchrun's processes as one group, for commands that build no Megatron model."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron_dsrl.model.parallel import world_size_from_environment
from megatron_dsrl.platform import current_platform

LIMIT = timedelta(days=14)
"""Of waiting for rank 0, which may sample for as long."""


@contextmanager
def process_group() -> Iterator[None]:
    """Each process on its device, and all of them in a gloo group where there are several. Undone at the end."""
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
