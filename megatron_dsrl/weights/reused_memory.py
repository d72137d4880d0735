"""Memory that holds one set of tensors after another."""

import math

import torch
from torch import Tensor

from megatron_dsrl.weights.layouts import Shape


class ReusedMemory:
    """Gives out CPU tensors in the same memory again and again, because new pages cost more than copying into them.

    It keeps as many blocks as tensors were in use at a time, each as large as its largest tensor so far.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._in_use = 0

    def free(self) -> None:
        """Start again: tensors given out so far will be overwritten."""
        self._in_use = 0

    def take(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until `free`. Its storage has exactly its size, as if it were alone."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        nbytes = count * dtype.itemsize
        if self._in_use == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
        if len(self._blocks[self._in_use]) < nbytes:
            self._blocks[self._in_use] = torch.empty(0, dtype=torch.uint8)  # frees the smaller block first
            self._blocks[self._in_use] = torch.empty(nbytes, dtype=torch.uint8)
        block = self._blocks[self._in_use]
        self._in_use += 1
        return torch.frombuffer(block.numpy(), dtype=dtype, count=count).view(shape)


def with_own_storage(tensor: Tensor) -> Tensor:
    """The same values in a storage of exactly their size, without a copy if the tensor is contiguous.

    torch.save writes the whole storage of a tensor, including what lies outside a view.
    """
    contiguous = tensor.contiguous()
    if contiguous.untyped_storage().nbytes() == contiguous.nbytes or contiguous.numel() == 0:
        return contiguous
    memory = contiguous.view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
