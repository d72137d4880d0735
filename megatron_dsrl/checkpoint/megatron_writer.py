"""Write Megatron's distributed checkpoints from any thread.

Megatron divides a save into three parts: planning, in which ranks agree on what each one writes and copy device
tensors; writing, which needs no communication; and finishing, in which rank 0 collects the locations of all chunks.
Megatron's asynchronous save writes in a separate process, which needs a multiprocessing manager for the results, takes
seconds to start, and outlives a killed trainer. Here a thread of the trainer can write, with an in-memory queue for the
results.
"""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_dsrl.common.disk import as_os_error

_Bucket = tuple[str, str, tuple[list, list]]
"""Megatron's write bucket: path, name, and (plan item, content) of the objects and of the tensors in a file."""


class CheckpointWrite:
    """This rank's part of a checkpoint, ready to be written; see `start_checkpoint`."""

    def __init__(self, request: AsyncRequest, results: queue.Queue, copy: bool) -> None:
        self._finalize = request.finalize_fns
        self._results = results
        self._buckets: list[_Bucket] = []
        self._transforms: list = []
        if request.async_fn is not None:  # else this rank has nothing to write
            self._transforms = request.async_fn.args[0]
            on_host = request.preload_fn()
            kept = request.async_fn_args[1]
            self._buckets = [_with_own_tensors(*pair) for pair in zip(on_host, kept)] if copy else on_host

    def write(self) -> list[Path]:
        """Write and flush this rank's files. Not collective; may run in any thread. Returns their paths. Raises OSError
        if a file cannot be written."""
        written = {}
        for number, bucket in enumerate(self._buckets):
            _, result = FileSystemWriterAsync.write_preloaded_data(
                self._transforms, number, bucket, results_queue=None, count_queue=None, use_fsync=True
            )
            if isinstance(result, Exception):
                raise as_os_error(result)
            written[number] = result
        files = [Path(path) for path, _, _ in self._buckets]
        self._buckets = [(path, name, ([], [])) for path, name, _ in self._buckets]  # frees the memory
        if files:
            self._results.put(written)
        return files

    def finish(self) -> None:
        """Write the metadata of the files of all ranks. Collective, in the main thread, after all ranks' `write`.
        Raises OSError, on rank 0 only, if the metadata cannot be written; all ranks complete the collectives."""
        with _failures_postponed():
            for finalize in self._finalize:
                finalize()


def start_checkpoint(state: dict[str, Any], folder: Path, metadata: dict[str, Any], copy: bool) -> CheckpointWrite:
    """Plan the checkpoint of a sharded state. Collective.

    Args:
        folder: an existing, empty folder.
        metadata: Megatron's content metadata, stored in the checkpoint.
        copy: copy all tensors, so that the state may change before it is written. Otherwise only device tensors are
            copied.
    """
    results: queue.Queue = queue.Queue()
    filesystem_async._results_queue = results  # otherwise Megatron starts a manager process for it
    request = dist_checkpointing.save(
        state, str(folder), content_metadata=metadata, async_sharded_save=True, async_strategy="mcore"
    )
    assert request is not None
    return CheckpointWrite(request, results, copy)


@contextmanager
def _failures_postponed() -> Iterator[None]:
    """Postpone OSErrors of rank 0 until Megatron's collectives in the body are done, then raise the first.

    Rank 0 writes `.metadata` and `metadata.json` while the other ranks wait for it in a broadcast and a barrier; an
    exception there would leave them waiting.
    """
    failures: list[OSError] = []

    def postponing(write: Callable[..., None]) -> Callable[..., None]:
        """The function with its OSErrors appended to `failures` instead of raised."""

        def write_or_postpone(*arguments: Any) -> None:
            try:
                write(*arguments)
            except OSError as error:
                failures.append(error)

        return write_or_postpone

    write_metadata, write_config = FileSystemWriterAsync.finish, serialization.save_config
    FileSystemWriterAsync.finish, serialization.save_config = postponing(write_metadata), postponing(write_config)
    try:
        yield
    finally:
        FileSystemWriterAsync.finish, serialization.save_config = write_metadata, write_config
    if failures:
        raise failures[0]


def _with_own_tensors(on_host: _Bucket, kept: _Bucket) -> _Bucket:
    """Clone tensors that still share memory with the model or the optimizer because they already were on the host."""
    path, name, (objects, tensors) = on_host
    own = [
        (item, tensor.clone() if _same_memory(tensor, original) else tensor)
        for (item, tensor), (_, original) in zip(tensors, kept[2][1])
    ]
    return path, name, (objects, own)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.device == other.device and one.data_ptr() == other.data_ptr()
