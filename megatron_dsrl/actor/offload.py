"""Free a model's device memory while the engine samples, and restore it afterwards.

Tensor objects and all views of them stay: Megatron's flat buffers, the parameters in them, the optimizer's shards. Only
the storage behind them is copied to the host and freed, and later reallocated with the same bytes. Nothing may read or
write the tensors in between; on CPU that crashes the process.

Megatron's own `offload_to_cpu` of optimizers and buffers is not used: it is for CUDA only, and the optimizer's assigns
a new tensor to `parameter.data`. A float32 weight that the distributed optimizer holds as a view into the model's
buffer then becomes a separate tensor, and later updates never reach the model.

Host memory: one copy of the rank's parameters and optimizer state, page-locked on CUDA, kept after the first use.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, UntypedStorage

from megatron_dsrl.platform import current_platform

ModelPart = Literal["gradients", "optimizer", "parameters"]

MODEL_PARTS: tuple[ModelPart, ...] = ("parameters", "gradients", "optimizer")

WITHOUT_CONTENT: tuple[ModelPart, ...] = ("gradients",)
"""Parts restored as zeros instead of being copied: every update begins with cleared gradients."""


class ModelMemory:
    """Device memory of a model's parts on this rank. Not collective."""

    def __init__(self, list_tensors: Callable[[], Mapping[ModelPart, Iterable[Tensor]]]) -> None:
        """`list_tensors` returns the tensors of each part; called before memory is freed. Memory shared by two parts
        belongs to the first."""
        self._list_tensors = list_tensors
        self._storages: dict[ModelPart, list[UntypedStorage]] = {}
        self._sizes: dict[ModelPart, list[int]] = {}
        """Storage sizes in bytes of the parts that are offloaded."""
        self._host: dict[ModelPart, list[Tensor]] = {}

    @property
    def away(self) -> Collection[ModelPart]:
        """The parts that are offloaded."""
        return self._sizes.keys()

    @torch.no_grad()
    def offload(self, parts: Collection[ModelPart]) -> int:
        """Free the memory of these parts, except those already offloaded; returns the bytes freed."""
        if parts and not self.away:
            self._storages = _storages_by_part(self._list_tensors())
        return sum(self._offload(part) for part in parts if part not in self._sizes)

    @torch.no_grad()
    def onload(self, parts: Collection[ModelPart]) -> int:
        """Restore those of these parts that are offloaded; returns the bytes restored."""
        restored = sum(self._onload(part) for part in parts if part in self._sizes)
        if not self.away:
            self._storages = {}  # otherwise it would keep memory alive that the optimizer replaces
        return restored

    def _offload(self, part: ModelPart) -> int:
        storages = self._storages[part]
        if part not in WITHOUT_CONTENT:
            self._host[part] = _copies(storages, self._host.get(part, []))
        self._sizes[part] = [storage.nbytes() for storage in storages]
        for storage in storages:
            storage.resize_(0)
        return sum(self._sizes[part])

    def _onload(self, part: ModelPart) -> int:
        sizes = self._sizes.pop(part)
        for number, (storage, size) in enumerate(zip(self._storages[part], sizes, strict=True)):
            storage.resize_(size)
            if part in WITHOUT_CONTENT:
                _as_bytes(storage).zero_()
            else:
                _as_bytes(storage).copy_(self._host[part][number])
        return sum(sizes)


def _storages_by_part(tensors: Mapping[ModelPart, Iterable[Tensor]]) -> dict[ModelPart, list[UntypedStorage]]:
    """The device storages behind the tensors of each part, each storage once."""
    device = current_platform().device.type
    known: set[int] = set()
    storages: dict[ModelPart, list[UntypedStorage]] = {}
    for part, part_tensors in tensors.items():
        storages[part] = []
        for tensor in part_tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type == device and storage.nbytes() > 0 and storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                storages[part].append(storage)
    return storages


def _copies(storages: list[UntypedStorage], earlier: list[Tensor]) -> list[Tensor]:
    """Copy the bytes to host memory, reusing earlier copies if their sizes match."""
    if [copy.nbytes for copy in earlier] != [storage.nbytes() for storage in storages]:
        return [current_platform().host_copy(_as_bytes(storage)) for storage in storages]
    for copy, storage in zip(earlier, storages):
        copy.copy_(_as_bytes(storage))
    return earlier


def _as_bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
