"""Reading Megatron checkpoints of unknown origin without running code that they may contain.

Both parts of a `torch_dist` checkpoint hold pickles, and a pickle can call any function when it is read: `.metadata`,
and the entries of `*.distcp` (or `common.pt`) that are not tensors. `.metadata` is read here with a list of the only
names that it may refer to; for the entries there is `torch.load`'s own list, which Megatron-core extends.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dsrl.common.errors import UserError

METADATA_FILE = ".metadata"
ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable: `torch.load` then reads nothing but what is on its list, even if it is called without it."""

DCP = "torch.distributed.checkpoint"
SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.metadata"
SAFE_NAMES = {
    *((f"{DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    *((f"{DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
    *((f"{DCP}.planner", name) for name in ("TensorWriteData", "BytesIOWriteData")),
    (f"{DCP}.filesystem", "_StorageInfo"),
    (SHARDED_TENSOR, "TensorProperties"),
    (SHARDED_TENSOR, "MEM_FORMAT_ENCODING"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
}
"""Module and name of the classes in `.metadata` of torch 2.4 and newer and of Megatron-core; dtypes are allowed too."""


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in SAFE_NAMES or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"refused, because it refers to {module}.{name}, which no checkpoint needs; it may run code when it is read"
        )


def read_metadata(folder: Path) -> Metadata:
    """The content of `.metadata`. Raises UserError if it is missing or damaged, or refers to something that is not part
    of a checkpoint's metadata."""
    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _SafeUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path} cannot be read: it holds a {type(metadata).__name__}")
    return metadata


@contextmanager
def only_plain_objects(folder: Path) -> Iterator[None]:
    """Within the block, Megatron may load the checkpoint: nothing in it can run code. Raises UserError if the
    checkpoint holds something other than tensors and plain objects."""
    read_metadata(folder)
    before = os.environ.get(ONLY_WEIGHTS)
    os.environ[ONLY_WEIGHTS] = "1"
    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values() if isinstance(failure, pickle.UnpicklingError)]
        if not failures:
            raise
        raise _refusal(folder, failures[0]) from error
    except pickle.UnpicklingError as error:
        raise _refusal(folder, error) from error
    finally:
        if before is None:
            del os.environ[ONLY_WEIGHTS]
        else:
            os.environ[ONLY_WEIGHTS] = before


def _refusal(folder: Path, error: BaseException) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if "nsupported" in line), str(error)[:300])
    return UserError(
        f"{folder}: refused, because an entry of the checkpoint is neither a tensor nor a plain object, and may run "
        f"code when it is read: {reason}"
    )
