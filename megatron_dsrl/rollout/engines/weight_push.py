"""Weights from the trainer to the engine on the same devices, in flattened buckets, without touching disk.

Only handles travel over HTTP: the engine opens the trainer's memory (CUDA IPC, or shared memory on CPU) and copies.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import torch.distributed

from megatron_dsrl.common.collective import first_problem, gather
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import EngineClient, connect
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket, BucketMemory, flatten, serialise


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
        version: the new weight version.
        engine: the engine; None on all but the first rank of the group.
        group: gloo group of the ranks that share the engine; None for a single rank.
        timeout_seconds: limit of each call.
        memory: for the buckets; pass the same to every push, which then needs no new memory on a CPU.

    Returns:
        None, or why the engine does not have the weights: it refused a call or is gone, and was not called again. The
        same on every rank of the group.
    """
    memory = memory or BucketMemory()
    with asyncio.Runner() as runner:
        receiver = _GroupsEngine(engine, group, timeout_seconds, runner)
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


def _gather(payload: str, group: torch.distributed.ProcessGroup | None) -> list[str]:
    """Payloads of all ranks of the group in rank order."""
    return [payload] if group is None else gather(payload, group)


class _GroupsEngine:
    """The engine as all ranks of its group see it. After the first failed call it keeps the problem and makes none."""

    def __init__(
        self,
        address: EngineAddress | None,
        group: torch.distributed.ProcessGroup | None,
        timeout_seconds: float,
        runner: asyncio.Runner,
    ) -> None:
        self.problem: str | None = None
        self._runner = runner
        self._address = address
        self._group = group
        self._timeout_seconds = timeout_seconds

    def call(self, call: Callable[[EngineClient], Awaitable[None]]) -> None:
        """Run `call(client)` on the rank that owns the engine. All ranks of the group wait for it."""
        if self.problem is not None:
            return
        problem = None if self._address is None else self._runner.run(self._call(self._address, call))
        self.problem = problem if self._group is None else first_problem(problem, self._group)

    async def _call(self, address: EngineAddress, call: Callable[[EngineClient], Awaitable[None]]) -> str | None:
        async with connect([address], self._timeout_seconds) as clients:
            try:
                await call(clients[0])
            except EngineError as error:
                return str(error)
        return None
