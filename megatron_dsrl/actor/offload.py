"""Device memory that a model gives up while the engine samples, and takes back.

The tensors stay, with every view of them: Megatron's flat buffers, the parameters that lie in them, the optimizer's
shards of those. Only the memory behind them goes, after its bytes were copied to host memory, and comes back as other
memory with the same bytes. Nothing may read or write the tensors in between; on CPU that ends the process.

Megatron has functions of this kind (`offload_to_cpu` of optimizers and buffers), for CUDA alone. The optimizer's gives
`parameter.data` another tensor: a float32 weight that the distributed optimizer has as a view into the model's buffer
comes back as a tensor of its own, and what is learned from then on never reaches the model. So they are not used.

Host memory: a copy of parameters and optimizer state of the rank, page-locked on CUDA, kept from the first time on.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, UntypedStorage

from megatron_dsrl.platform import current_platform

ModelPart = Literal["gradients", "optimizer", "parameters"]

MODEL_PARTS: Collection[ModelPart] = ("parameters", "gradients", "optimizer")

WITHOUT_CONTENT: Collection[ModelPart] = ("gradients",)
"""Parts that come back as zeros: every update begins with cleared gradients."""


class ModelMemory:
    """The device memory of one model's parts on this rank. Not collective."""

    def __init__(self, tensors_of: Callable[[], Mapping[ModelPart, Iterable[Tensor]]]):
        """
        Args:
            tensors_of: the tensors of every part, asked for before memory is given up. Memory that two parts share
                belongs to the first of them.
        """
        self._tensors_of = tensors_of
        self._storages: dict[ModelPart, list[UntypedStorage]] = {}
        self._sizes: dict[ModelPart, list[int]] = {}
        """Of the parts that are away."""
        self._host: dict[ModelPart, list[Tensor]] = {}

    @property
    def away(self) -> Collection[ModelPart]:
        """The parts whose memory is given up."""
        return self._sizes.keys()

    @torch.no_grad()
    def offload(self, parts: Collection[ModelPart]) -> int:
        """Give up the memory of those of the parts that are there; returns bytes given up."""
        if parts and not self.away:
            self._storages = _storages_by_part(self._tensors_of())
        return sum(self._offload(part) for part in parts if part not in self._sizes)

    @torch.no_grad()
    def onload(self, parts: Collection[ModelPart]) -> int:
        """Take back those of the parts that are away; returns bytes taken back."""
        taken = sum(self._onload(part) for part in parts if part in self._sizes)
        if not self.away:
            self._storages = {}  # or it would keep memory that the optimizer replaces
        return taken

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
                _bytes_of(storage).zero_()
            else:
                _bytes_of(storage).copy_(self._host[part][number])
        return sum(sizes)


def _storages_by_part(tensors_of: Mapping[ModelPart, Iterable[Tensor]]) -> dict[ModelPart, list[UntypedStorage]]:
    """The memory on the device behind the tensors of every part, each piece once."""
    device, known = current_platform().device.type, set()
    storages: dict[ModelPart, list[UntypedStorage]] = {}
    for part, tensors in tensors_of.items():
        storages[part] = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type == device and storage.nbytes() > 0 and storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                storages[part].append(storage)
    return storages


def _copies(storages: list[UntypedStorage], earlier: list[Tensor]) -> list[Tensor]:
    """The bytes in host memory; in that of earlier copies where it fits."""
    if [copy.nbytes for copy in earlier] != [storage.nbytes() for storage in storages]:
        return [current_platform().host_copy(_bytes_of(storage)) for storage in storages]
    for copy, storage in zip(earlier, storages):
        copy.copy_(_bytes_of(storage))
    return earlier


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
