"""Let `torch.compile` return functions as they are: engines on CPU do not compile (`TORCH_COMPILE_DISABLE`).

SGLang decorates functions with it when it is imported, and the decorator alone imports PyTorch's compiler: a tenth of
the time of an engine's start.
"""

from collections.abc import Callable
from typing import Any

import torch


def uncompiled(function: Callable | None = None, **options: Any) -> Callable:
    """Takes the place of `torch.compile`, with its signature: `torch.compile(f, ...)`, `@torch.compile`,
    `@torch.compile(...)`."""
    return uncompiled if function is None else function


def install() -> None:
    """Idempotent. Call it before importing `sglang`."""
    torch.compile = uncompiled  # type: ignore[assignment]
