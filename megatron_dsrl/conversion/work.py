"""How a conversion goes through a model: entries are divided between processes, read ahead, and cast to a dtype."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from megatron_dsrl.common.collective import join_processes, rank, world_size
from megatron_dsrl.common.process import launched_world_size
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.weights.hf_checkpoint import torch_dtype_name
from megatron_dsrl.weights.reused_memory import ReusedMemory
from megatron_dsrl.weights.table import TableEntry, WeightTable

Value = TypeVar("Value")

NAMES_SHOWN = 3
CONVERSION_LIMIT = timedelta(minutes=30)
"""Limit for waiting on another process, whose share may be larger or its disk slower."""


@contextmanager
def conversion_processes() -> Iterator[None]:
    """Join the processes that torchrun started in one group during the block; a single process needs none."""
    was_running = dist.is_initialized()
    if launched_world_size() > 1 and not was_running:
        join_processes("gloo", CONVERSION_LIMIT)
    try:
        yield
    finally:
        if dist.is_initialized() and not was_running:  # comparing logits starts it even for a single process
            dist.destroy_process_group()


def entry_elements(entry: TableEntry) -> int:
    """Number of elements in all HF tensors of an entry."""
    return sum(torch.Size(tensor.shape).numel() for tensor in entry.hf)


def my_entries(table: WeightTable) -> list[TableEntry]:
    """This process's share: consecutive entries with about the same number of elements on every process."""
    entries = list(table.entries())
    total = sum(map(entry_elements, entries))
    mine, before = [], 0
    for entry in entries:
        elements = entry_elements(entry)
        if (before + elements // 2) * world_size() // total == rank():
            mine.append(entry)
        before += elements
    return mine


def with_progress(entries: Sequence[TableEntry], dtype: torch.dtype, title: str) -> Iterator[TableEntry]:
    """Yield the entries with a progress bar on rank 0, which shows the bytes of its share."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=rank() != 0) as progress:
        total = sum(map(entry_elements, entries)) * dtype.itemsize
        share = f" (1/{world_size()} of the model)" if world_size() > 1 else ""
        task = progress.add_task(title + share, total=total)
        for entry in entries:
            yield entry
            progress.advance(task, entry_elements(entry) * dtype.itemsize)


def read_ahead(entries: Sequence[TableEntry], read: Callable[[TableEntry, ReusedMemory], Value]) -> Iterator[Value]:
    """What `read` returns for each entry. While one is in use, a thread reads the next one. Tensors in the memory that
    `read` is given are valid until the next ones are requested."""
    memories = (ReusedMemory(), ReusedMemory())

    def read_entry(number: int) -> Value:
        memory = memories[number % 2]
        memory.free()
        return read(entries[number], memory)

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        reading = thread.submit(read_entry, 0) if entries else None
        for following in range(1, len(entries) + 1):
            assert reading is not None
            value = reading.result()
            reading = thread.submit(read_entry, following) if following < len(entries) else None
            yield value


class Cast:
    """Casts tensors and counts values that are not finite."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        """Dtype None leaves tensors as they are."""
        self._dtype = dtype
        self.overflows: Counter[str] = Counter()
        """Values beyond the dtype's range, by tensor name: they became infinite."""
        self.not_finite: Counter[str] = Counter()
        """NaN and infinite values of the source, by tensor name."""

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the dtype."""
        converted = tensor.to(self._dtype or tensor.dtype)
        # The extremes show NaN and infinity, and are many times faster than looking at every value or a float32 sum.
        if converted.numel() and not torch.stack(converted.aminmax()).isfinite().all():
            before = int(tensor.isfinite().logical_not().sum())
            after = int(converted.isfinite().logical_not().sum())
            self.not_finite += Counter({name: before})
            self.overflows += Counter({name: after - before})
        return converted


def overflow_message(casts: Sequence[Cast], dtype: torch.dtype | None) -> str | None:
    """Which values are lost in a dtype, over all processes; None if none are."""
    counts = sum((cast.overflows for cast in casts), Counter[str]())
    if not counts or dtype is None:
        return None
    return (
        f"{_shown(counts)} beyond the range of {torch_dtype_name(dtype)} (largest number {torch.finfo(dtype).max:.6g}) "
        "became infinite; choose another --dtype"
    )


def not_finite_message(casts: Sequence[Cast]) -> str | None:
    """Where the source is not finite, over all processes; None if it is."""
    counts = sum((cast.not_finite for cast in casts), Counter[str]())
    return f"the source has NaN or infinite values: {_shown(counts)}" if counts else None


def warn(casts: Sequence[Cast], dtype: torch.dtype) -> None:
    """Print both messages, on one process."""
    for message in (overflow_message(casts, dtype), not_finite_message(casts)):
        if message is not None:
            say_on_first_rank(f"warning: {message}")


def _shown(counts: Counter[str]) -> str:
    names = ", ".join(f"{count} in {name}" for name, count in counts.most_common(NAMES_SHOWN))
    more = f", and {len(counts) - NAMES_SHOWN} more tensors" if len(counts) > NAMES_SHOWN else ""
    return f"{counts.total()} value{'s' if counts.total() > 1 else ''} ({names}{more})"
