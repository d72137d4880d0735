"""Weights from the trainer to external SGLang servers: flattened buckets broadcast with torch.distributed.

Rank 0 of the trainer forms a group with the ranks of each server (NCCL on GPUs, gloo on CPU) and sends every bucket to
all groups at the same time. One group for all servers would send less from rank 0, but a single lost server would block
the others.

A server joins a broadcast only after an HTTP call has announced it, so each bucket is a concurrent call and broadcast.
Both have a time limit, and a server that refuses the call ends its broadcast. torch.distributed runs in threads: NCCL
connects at a group's first broadcast, and that call returns only when the server takes part.
"""

import asyncio
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group, _new_process_group_helper, _world

from megatron_dsrl.common.background import in_background
from megatron_dsrl.platform.engine import weight_broadcast_backend
from megatron_dsrl.rollout.engines.address import EngineAddress, address_towards
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket, BucketMemory, flatten

POLL_SECONDS = 0.001
LEAVE_SECONDS = 10.0
"""Limit for dissolving a group; its server may be gone."""


class ServerLink:
    """Rank 0's connection for sending weights to one server. Exists on rank 0 only, so methods are not collective."""

    def __init__(self, address: EngineAddress, timeout_seconds: float) -> None:
        """`timeout_seconds` limits every call and every broadcast."""
        self.url = address.url
        self.address = address
        self.size = 0
        """Ranks of the server; known once it is connected."""
        self._timeout_seconds = timeout_seconds
        self._group: dist.ProcessGroup | None = None
        self.group_name = ""
        """Name of the group with the server's ranks; empty without one."""
        self._broadcast: Future[dist.Work] | None = None
        """The last broadcast, which may still be waiting for the server to join."""

    @property
    def is_connected(self) -> bool:
        """Whether there is a group with the server's ranks. They may have died since."""
        return self._group is not None

    async def connect(self) -> None:
        """Form a group with the server's ranks, replacing an earlier one.

        Raises:
            EngineError: the server refused, is gone, or cannot reach this process.
        """
        with suppress(EngineError):  # a new server at this URL does not know the old group
            await self.leave()
        host = self._host_towards_server()
        store, port = _open_store(host, self._timeout_seconds)
        async with self._client() as client:
            # Clean up after an earlier run, or this one before it lost the server: requests, an open update. It
            # stays paused, if it is: its weights may be half of one version and half of another.
            await client.abort_all()
            with suppress(EngineError):
                await client.end_weight_update()
            self.size = await client.tensor_parallel_size()
            name = f"dsrl-{secrets.token_hex(8)}"
            backend = weight_broadcast_backend()
            joined = asyncio.create_task(client.join(name, host, port, 1 + self.size, backend))
            made = _join_as_sender(dist.PrefixStore(name, store), name, 1 + self.size, backend, self._timeout_seconds)
            await self._both(joined, made.done)
        try:
            self._group, self.group_name = made.result(), name
        except RuntimeError as error:
            raise EngineError(f"engine {self.url}: no group for weights: {error}") from error

    async def start(self) -> None:
        """Open a weight update. Running requests pause until `finish`."""
        async with self._client() as client:
            await client.pause()
            await client.begin_weight_update()

    async def send(self, flattened: dict[str, Any]) -> None:
        """Broadcast what `flatten` returns with an alignment of one byte, that is without gaps. Returns when the server
        has loaded it."""
        assert self._group is not None
        entries = flattened["metadata"]
        async with self._client() as client:
            answer = asyncio.create_task(
                client.receive_weights(
                    self.group_name,
                    [entry.name for entry in entries],
                    [str(entry.dtype).removeprefix("torch.") for entry in entries],
                    [entry.shape for entry in entries],
                )
            )
            self._broadcast = broadcast = _start_broadcast(self._group, flattened["flattened_tensor"])
            try:
                await self._both(answer, lambda: broadcast.done() and broadcast.result().is_completed())
                broadcast.result().wait()
            except EngineError:
                raise
            except RuntimeError as error:
                answer.cancel()
                raise EngineError(f"engine {self.url}: the broadcast of weights failed: {error}") from error

    async def finish(self, version: int) -> None:
        """Close the update, set the version that tokens carry from now on, and continue the paused requests."""
        async with self._client() as client:
            await client.end_weight_update()
            await client.set_weight_version(version)
            await client.resume()

    async def digests(self) -> list[dict[str, str]]:
        async with self._client() as client:
            return await client.weight_digests()

    async def leave(self) -> None:
        """Dissolve the group on both sides."""
        name, self.group_name = self.group_name, ""
        self.disconnect()
        if name:
            async with EngineClient(self.address, min(LEAVE_SECONDS, self._timeout_seconds)) as client:
                await client.leave(name)

    def disconnect(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            _leave_group(group, self._broadcast)

    def _client(self) -> EngineClient:
        return EngineClient(self.address, self._timeout_seconds)

    def _host_towards_server(self) -> str:
        address = urlsplit(self.url)
        assert address.hostname is not None, "engine.urls was validated"
        try:
            return address_towards(address.hostname, address.port or 80)
        except OSError as error:
            raise EngineError(f"engine {self.url} cannot be reached: {error}") from error

    async def _both(self, answer: "asyncio.Task[None]", is_done: Callable[[], bool]) -> None:
        """Wait for both the server's answer and the local operation; a refusal by the server ends the wait."""
        deadline = time.monotonic() + self._timeout_seconds
        while not (answer.done() and is_done()):
            if answer.done():
                answer.result()
            if time.monotonic() > deadline:
                answer.cancel()
                raise EngineError(f"engine {self.url}: no weights were exchanged within {self._timeout_seconds:g} s")
            await asyncio.sleep(POLL_SECONDS)
        answer.result()


async def broadcast_weights(links: Sequence[ServerLink], buckets: Iterable[Bucket], version: int) -> dict[str, str]:
    """Replace the weights of connected servers and set their version; the counterpart of `push_weights`.

    All buckets are consumed even if servers fail. No bucket is taken before all servers have confirmed the last.

    Args:
        buckets: non-empty lists of (HF name, full tensor), each of one dtype.

    Returns:
        Why a server does not have the weights, by URL; empty if all have them. Such servers are disconnected.
    """
    problems: dict[str, str] = {}
    memory = BucketMemory()

    async def every(action: Callable[[ServerLink], Awaitable[None]]) -> None:
        async def note_problem(link: ServerLink) -> None:
            try:
                await action(link)
            except EngineError as error:
                problems[link.url] = str(error)
                link.disconnect()

        await asyncio.gather(*(note_problem(link) for link in links if link.url not in problems))

    await every(lambda link: link.start())
    for bucket in buckets:
        if len(problems) < len(links):
            assert len({tensor.dtype for _, tensor in bucket}) == 1, "SGLang needs aligned tensors without gaps"
            flattened = flatten(bucket, memory, alignment_bytes=1)
            await every(lambda link: link.send(flattened))
            del flattened  # not before the servers have confirmed
    await every(lambda link: link.finish(version))
    return problems


def _open_store(host: str, timeout_seconds: float) -> tuple[dist.TCPStore, int]:
    """A store, and its free port on `host`, at which a group can meet."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    return store, port


def _join_as_sender(
    store: dist.Store, name: str, size: int, backend: str, timeout_seconds: float
) -> "Future[dist.ProcessGroup]":
    """Create the group in a thread, as rank 0. Fails with RuntimeError if the server does not join in time."""

    def make() -> dist.ProcessGroup:
        # SGLang calls this function too, so both sides agree on the keys of the rendezvous. The public new_group can
        # only make groups of the trainer's own processes.
        made, _ = _new_process_group_helper(
            size,
            0,
            [],
            dist.Backend(backend),
            store,
            group_name=name,  # type: ignore[arg-type]  # GroupName, a NewType of str
            timeout=timedelta(seconds=timeout_seconds),
        )
        _world.pg_group_ranks[made] = {rank: rank for rank in range(size)}  # needed to destroy it
        return made

    return in_background(make)


def _start_broadcast(group: dist.ProcessGroup, tensor: torch.Tensor) -> "Future[dist.Work]":
    """Broadcast a tensor from rank 0, in a thread."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return in_background(lambda: group.broadcast([tensor], options))


def _leave_group(group: dist.ProcessGroup, last_broadcast: "Future[dist.Work] | None") -> None:
    """Leave the group on this side, without waiting for a broadcast that the server may never join."""
    if last_broadcast is None or _has_ended(last_broadcast):
        dist.destroy_process_group(group)
    else:
        threading.Thread(target=_destroy_after, args=(group, last_broadcast), daemon=True).start()


def _has_ended(broadcast: "Future[dist.Work]") -> bool:
    return broadcast.done() and (broadcast.exception() is not None or broadcast.result().is_completed())


def _destroy_after(group: dist.ProcessGroup, broadcast: "Future[dist.Work]") -> None:
    """Destroy a group once its last broadcast has ended, at the latest when its time limit expires.

    Destroying it earlier would also wait, and block all Python threads meanwhile. NCCL's watchdog would kill this
    process at the time limit, so an NCCL group is aborted, which ends the broadcast at once.
    """
    while not _has_ended(broadcast):
        if broadcast.done() and weight_broadcast_backend() == "nccl":
            _abort_process_group(group)
            return
        time.sleep(0.1)
    dist.destroy_process_group(group)
