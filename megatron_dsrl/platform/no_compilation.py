"""Let `torch.compile` return functions as they are: on a CPU neither trainer nor engines compile.

SGLang and Megatron decorate functions with it when they are imported, and the decorator alone imports PyTorch's
compiler: a tenth of the time of either import.
"""

from collections.abc import Callable
from typing import Any

import torch


def uncompiled(function: Callable | None = None, **options: Any) -> Callable:
    """Takes the place of `torch.compile`, with its signature: `torch.compile(f, ...)`, `@torch.compile`,
    `@torch.compile(...)`."""
    return uncompiled if function is None else function


def install() -> None:
    """Idempotent. Call it before importing `sglang` or `megatron`."""
    torch.compile = uncompiled  # type: ignore[assignment]
