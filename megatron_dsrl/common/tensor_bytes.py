"""The memory of a CPU tensor as bytes."""

import ctypes

from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, without a copy; valid while the tensor is.

    `Tensor.numpy` would do the same, but it forbids for good to resize the tensor's storage, as offloading does.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
