"""Unpinned host memory for SGLang on a machine without CUDA, where memory cannot and need not be pinned.

SGLang keeps the routed experts of its tokens in host memory that it registers with CUDA. It looks up the allocator by
device type, so it is enough to replace the one for `cpu`.
"""

from typing import Any

import torch
from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS


def allocate(dims: tuple[int, ...], dtype: torch.dtype, device: str, pin_memory: bool, allocator: Any) -> torch.Tensor:
    """Ordinary memory from SGLang's `allocator`; ignores `pin_memory`."""
    return allocator.allocate(dims, dtype=dtype, device=device)


def register() -> None:
    """Use `allocate` for SGLang's host memory in this process."""
    ALLOC_MEMORY_FUNCS["cpu"] = allocate
