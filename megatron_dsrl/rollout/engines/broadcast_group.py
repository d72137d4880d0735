"""A torch.distributed group of the trainer's rank 0 and the ranks of an external server, made and left by rank 0 alone.

torch.distributed runs in threads: NCCL connects at a group's first broadcast, and that call returns only when the
server takes part.
"""

import socket
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group, _new_process_group_helper, _world

from megatron_dsrl.common.process import in_background
from megatron_dsrl.platform.engine import weight_broadcast_backend


@dataclass(frozen=True)
class BroadcastGroup:
    """How the ranks of a server join; the sender is rank 0, they come after it."""

    name: str
    host: str
    """Address of the sender's store, the meeting point of the group."""
    port: int
    size: int
    backend: str
    """gloo or nccl."""


def open_store(host: str, timeout_seconds: float) -> tuple[dist.TCPStore, int]:
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


def join_as_sender(store: dist.Store, group: BroadcastGroup, timeout_seconds: float) -> "Future[dist.ProcessGroup]":
    """Create the group in a thread, as rank 0.

    The future holds the group; it fails with RuntimeError if the server does not join in time.
    """

    def make() -> dist.ProcessGroup:
        # SGLang calls this function too, so both sides agree on the keys of the rendezvous. The public new_group can
        # only make groups of the trainer's own processes.
        made, _ = _new_process_group_helper(
            group.size,
            0,
            [],
            dist.Backend(group.backend),
            dist.PrefixStore(group.name, store),
            group_name=group.name,  # type: ignore[arg-type]  # GroupName, a NewType of str
            timeout=timedelta(seconds=timeout_seconds),
        )
        _world.pg_group_ranks[made] = {rank: rank for rank in range(group.size)}  # needed to destroy it
        return made

    return in_background(make)


def start_broadcast(group: dist.ProcessGroup, tensor: torch.Tensor) -> "Future[dist.Work]":
    """Broadcast a tensor from rank 0, in a thread."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return in_background(lambda: group.broadcast([tensor], options))


def leave_group(group: dist.ProcessGroup, last_broadcast: "Future[dist.Work] | None") -> None:
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
