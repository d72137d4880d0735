"""Host memory of SGLang on a machine without CUDA: nothing can be pinned, and nothing needs to be.

SGLang keeps the experts that its tokens went to in host memory that it registers with CUDA. It looks its allocator up
by the device type, so another one for `cpu` is all it takes.
"""

from typing import Any

import torch
from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS


def allocate(dims: tuple[int, ...], dtype: torch.dtype, device: str, pin_memory: bool, allocator: Any) -> torch.Tensor:
    """Ordinary memory from SGLang's own `allocator`, pinned or not."""
    return allocator.allocate(dims, dtype=dtype, device=device)


def register() -> None:
    """Use it for everything that SGLang allocates beside a CPU engine in this process."""
    ALLOC_MEMORY_FUNCS["cpu"] = allocate
