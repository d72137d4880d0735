"""Weights from the trainer to the engine on the same devices, in flattened buckets, without touching disk.

Only handles travel over HTTP: the engine opens the trainer's memory (CUDA IPC, or shared memory on CPU) and copies. On
CPU the next bucket is filled meanwhile.
"""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch.distributed

from megatron_dsrl.common.background import in_background
from megatron_dsrl.common.collective import first_problem, gather_within
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.planning.memory import element_bytes
from megatron_dsrl.planning.parameters import parameters_of_model
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket, BucketMemory, flatten, serialise

SHARED_MEMORY = Path("/dev/shm")


def push_weights(
    buckets: Iterable[Bucket],
    version: int,
    engine: EngineAddress | None,
    group: torch.distributed.ProcessGroup | None,
    timeout_seconds: float,
    memory: BucketMemory | None = None,
) -> str | None:
    """Replace the engine's weights and set their version. All ranks of the engine's group call it together.

    No sample may be running. The version is set after the last bucket was confirmed. All buckets are consumed even if
    the engine fails, because ranks of other engines take part in gathering them.

    Args:
        buckets: non-empty lists of (HF name, full tensor), the same on every rank of the group. Tensors of a bucket
            may be overwritten when the next bucket is taken.
        engine: None on all but the first rank of the group.
        group: gloo group of the ranks that share the engine; None for a single rank.
        timeout_seconds: limit of each call.
        memory: for the buckets; pass the same to every push, which then needs no new memory on a CPU.

    Returns:
        None, or why the engine does not have the weights: it refused a call or is gone, and was not called again. The
        same on every rank of the group.
    """
    memory = memory or BucketMemory()
    receiver = _GroupsEngine(engine, group, timeout_seconds)
    receiver.start(EngineClient.begin_weight_update)
    for bucket in buckets:
        if receiver.problem is not None:
            continue
        flattened = flatten(bucket, memory)
        receiver.wait()  # it may still be copying the previous bucket
        payloads = gather_within(group, serialise(flattened))
        receiver.start(partial(EngineClient.update_weights, payload_per_rank=payloads), flattened)
        if not memory.holds_two(bucket[0][1].device):
            receiver.wait()
        del flattened
    receiver.wait()
    receiver.start(EngineClient.end_weight_update)
    receiver.wait()
    receiver.start(partial(EngineClient.set_weight_version, version=version))
    receiver.wait()
    return receiver.problem


class _GroupsEngine:
    """The engine as all ranks of its group see it. After the first failed call it keeps the problem and makes none."""

    def __init__(
        self, address: EngineAddress | None, group: torch.distributed.ProcessGroup | None, timeout_seconds: float
    ) -> None:
        self.problem: str | None = None
        self._address = address
        self._group = group
        self._timeout_seconds = timeout_seconds
        self._call: Future[str | None] | None = None
        self._needed: object = None

    def start(self, call: Callable[[EngineClient], Awaitable[None]], needed: object = None) -> None:
        """Start `call(client)` in a thread of the rank that owns the engine. The previous one must have been awaited.

        Args:
            needed: is kept until the call has ended.
        """
        if self.problem is None:
            address, self._needed = self._address, needed
            self._call = in_background(lambda: asyncio.run(self._made(address, call)) if address else None)

    def wait(self) -> None:
        """Wait for the call, if one was started. All ranks of the group wait for it."""
        if self._call is None:
            return
        call, self._call = self._call, None
        problem = call.result()
        self._needed = None
        self.problem = problem if self._group is None else first_problem(problem, self._group)

    async def _made(self, address: EngineAddress, call: Callable[[EngineClient], Awaitable[None]]) -> str | None:
        async with EngineClient(address, self._timeout_seconds) as client:
            try:
                await call(client)
            except EngineError as error:
                return str(error)
        return None


def check_shared_memory(config: RolloutSettings, ranks: int) -> None:
    """Check that /dev/shm has room for the buckets of a CPU run: each of this machine's ranks fills one while an engine
    copies another. Raises UserError if it does not."""
    architecture = read_architecture(resolve_model_folder(config.model.path))
    size = element_bytes(config.model)
    largest_tensor = size * architecture.vocab_size * architecture.hidden_size
    largest_bucket = max(config.engine.weight_bucket_megabytes * 2**20, largest_tensor)
    needed = min(size * parameters_of_model(architecture), 2 * largest_bucket)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < ranks * needed:
        raise UserError(
            f"engine.weight_bucket_megabytes: on a CPU, weights go to the engines through {SHARED_MEMORY}, in two "
            f"buckets at a time, {needed / 2**20:.1f} MiB for each of {counted(ranks, 'process')}, but "
            f"{free / 2**20:.1f} MiB are free; lower the bucket size, remove old files "
            "there, or enlarge it (docker run --shm-size=16g)"
        )
