"""A bucket of weights as one byte tensor and a table of the tensors in it: SGLang's `flattened_bucket` load format.

The format is reimplemented here because importing SGLang patches Transformers in the trainer's process.
"""

import base64
import io
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing  # noqa: F401  (teaches ForkingPickler to share tensors)

from megatron_dsrl.platform.engine import tensor_sharing

Bucket = list[tuple[str, torch.Tensor]]
"""Full, HF-named tensors."""

ALIGNMENT_BYTES = 16
"""Alignment of tensors in a bucket, so that it may mix dtypes."""


class BucketMemory:
    """Memory of buckets until the engine has copied them.

    On CPU two buckets take turns in shared memory, because new pages cost more than the copies; this object keeps both,
    each as large as the largest bucket that it has held. On CUDA every bucket gets its own memory: PyTorch does not
    reuse shared memory until the other process has released it and its copies are done.
    """

    def __init__(self) -> None:
        self._shared = [torch.empty(0, dtype=torch.uint8)] * 2

    def holds_two(self, device: torch.device) -> bool:
        """Whether a bucket can be filled while the engine copies the previous one. On CUDA it would take more of the
        GPU's memory, and save the milliseconds of a copy within it."""
        return device.type == "cpu"

    def take(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Uninitialised bytes, [num_bytes] uint8. The engine must have confirmed all buckets that it has received, and
        on CPU all but the last one."""
        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._shared.reverse()
        if len(self._shared[0]) < num_bytes:
            with tensor_sharing():
                self._shared[0] = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
        return self._shared[0][:num_bytes]


def flatten(bucket: Bucket, memory: BucketMemory, alignment_bytes: int = ALIGNMENT_BYTES) -> dict[str, Any]:
    """One byte tensor that holds all tensors of the bucket (at least one), and the table of their offsets, multiples of
    `alignment_bytes`."""
    assert bucket, "a bucket holds at least one tensor"
    table, offset, padded = [], 0, []
    for name, tensor in bucket:
        size = tensor.nbytes
        table.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=offset, end_idx=offset + size, numel=size
            )
        )
        padded.append(-(-size // alignment_bytes) * alignment_bytes)
        offset += padded[-1]
    flattened = memory.take(offset, bucket[0][1].device)
    tensors = [tensor.detach() for _, tensor in bucket]
    dtype = tensors[0].dtype
    if any(tensor.dtype != dtype for tensor in tensors):
        tensors, dtype = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors], torch.uint8
    places = flattened.view(dtype).split([size // dtype.itemsize for size in padded])
    views = [place[: tensor.numel()].view(tensor.shape) for place, tensor in zip(places, tensors, strict=True)]
    torch._foreach_copy_(views, tensors)  # on CUDA one kernel for many tensors
    return {"flattened_tensor": flattened, "metadata": table}


def serialise(flattened: dict[str, Any]) -> str:
    """Base64 of a pickle with a handle to the tensor's memory. It can be opened once."""
    stream = io.BytesIO()
    with tensor_sharing():
        ForkingPickler(stream).dump(flattened)
    return base64.b64encode(stream.getvalue()).decode("ascii")
