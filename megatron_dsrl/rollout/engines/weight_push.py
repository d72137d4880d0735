"""Weights from the trainer to the engine on the same devices, in flattened buckets, without touching disk.

Only handles travel over HTTP: the engine opens the trainer's memory (CUDA IPC, or shared memory on CPU) and copies.
A bucket is one byte tensor and a table of the tensors in it, in SGLang's `flattened_bucket` load format. The format is
reimplemented here because importing SGLang patches Transformers in the trainer's process.
"""

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing  # noqa: F401  (teaches ForkingPickler to share tensors)

from megatron_dsrl.common.collective import first_problem, gather
from megatron_dsrl.platform.engine import tensor_sharing
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import EngineClient, connect
from megatron_dsrl.rollout.engines.errors import EngineError

Bucket = list[tuple[str, torch.Tensor]]
"""Full, HF-named tensors."""

ALIGNMENT_BYTES = 16
"""Alignment of tensors in a bucket, so that it may mix dtypes."""


def push_weights(
    buckets: Iterable[Bucket],
    version: int,
    engine: EngineAddress | None,
    group: torch.distributed.ProcessGroup | None,
    timeout_seconds: float,
) -> str | None:
    """Replace the engine's weights and set their version. All ranks of the engine's group call it together.

    No sample may be running. The version is set after the last bucket was confirmed. All buckets are consumed even if
    the engine fails, because ranks of other engines take part in gathering them.

    Args:
        buckets: Non-empty lists of (HF name, full tensor), the same on every rank of the group. Tensors of a bucket
            may be overwritten when the next bucket is taken.
        version: The new weight version.
        engine: The engine; None on all but the first rank of the group.
        group: Gloo group of the ranks that share the engine; None for a single rank.
        timeout_seconds: Limit of each call.

    Returns:
        None, or why the engine does not have the weights: it refused a call or is gone, and was not called again. The
        same on every rank of the group.
    """
    receiver, memory = _GroupsEngine(engine, group, timeout_seconds), BucketMemory()
    receiver.call(lambda client: client.begin_weight_update())
    for bucket in buckets:
        if receiver.problem is not None:
            continue
        flattened = flatten(bucket, memory)
        payloads = _gather(serialise(flattened), group)
        receiver.call(lambda client: client.update_weights(payloads))
        del flattened  # not before the engine has confirmed
    receiver.call(lambda client: client.end_weight_update())
    receiver.call(lambda client: client.set_weight_version(version))
    return receiver.problem


class BucketMemory:
    """Memory of a bucket until the engine has copied it; one bucket at a time.

    On CPU all buckets use the same shared memory, because new pages cost more than the copies. On CUDA every bucket
    gets its own memory: PyTorch does not reuse shared memory until the other process has released it and its copies
    are done.
    """

    def __init__(self) -> None:
        self._shared = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Uninitialised bytes, [num_bytes] uint8. The engine must have confirmed the previous bucket."""
        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        if len(self._shared) < num_bytes:
            with tensor_sharing():
                self._shared = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
        return self._shared[:num_bytes]


def flatten(bucket: Bucket, memory: BucketMemory, alignment_bytes: int = ALIGNMENT_BYTES) -> dict[str, Any]:
    """One byte tensor that holds all tensors of the bucket, and the table of their offsets.

    Args:
        bucket: at least one tensor.
        memory: provides the byte tensor.
        alignment_bytes: every tensor starts at a multiple of this.
    """
    assert bucket, "a bucket holds at least one tensor"
    table, offset = [], 0
    for name, tensor in bucket:
        size = tensor.numel() * tensor.element_size()
        table.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=offset, end_idx=offset + size, numel=size
            )
        )
        offset += -(-size // alignment_bytes) * alignment_bytes
    flattened = memory.take(offset, bucket[0][1].device)
    for entry, (_, tensor) in zip(table, bucket, strict=True):
        flattened[entry.start_idx : entry.end_idx].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
    return {"flattened_tensor": flattened, "metadata": table}


def serialise(flattened: dict[str, Any]) -> str:
    """Base64 of a pickle with a handle to the tensor's memory. It can be opened once."""
    stream = io.BytesIO()
    with tensor_sharing():
        ForkingPickler(stream).dump(flattened)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _gather(payload: str, group: torch.distributed.ProcessGroup | None) -> list[str]:
    """Payloads of all ranks of the group in rank order."""
    return [payload] if group is None else gather(payload, group)


class _GroupsEngine:
    """The engine as all ranks of its group see it. After the first failed call it keeps the problem and makes none."""

    def __init__(
        self, address: EngineAddress | None, group: torch.distributed.ProcessGroup | None, timeout_seconds: float
    ) -> None:
        self.problem: str | None = None
        self._address = address
        self._group = group
        self._timeout_seconds = timeout_seconds

    def call(self, call: Callable[[EngineClient], Awaitable[None]]) -> None:
        """Run `call(client)` on the rank that owns the engine. All ranks of the group wait for it."""
        if self.problem is not None:
            return
        problem = None if self._address is None else asyncio.run(self._call(self._address, call))
        self.problem = problem if self._group is None else first_problem(problem, self._group)

    async def _call(self, address: EngineAddress, call: Callable[[EngineClient], Awaitable[None]]) -> str | None:
        async with connect([address], self._timeout_seconds) as clients:
            try:
                await call(clients[0])
            except EngineError as error:
                return str(error)
        return None
