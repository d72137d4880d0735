"""The code with which a receiver opens a bucket of weights: SGLang's own where it can be imported."""

import base64
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NamedTensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class BucketCode:
    """How a receiver opens what it gets."""

    open: Callable[[str], dict[str, Any]]
    """From the text that is sent to `flattened_tensor` and `metadata`."""
    tensors: Callable[[torch.Tensor, list[Any]], NamedTensors]
    """From these two to the named tensors, which are views."""
    description: str
    """Whose code it is, and if not SGLang's, why."""


def choose_bucket_code() -> BucketCode:
    """SGLang's unpickler and bucket; without its dependencies, only its bucket, in a self-contained file; without
    SGLang's files, the project's reading of its format."""
    try:
        from megatron_dsrl.platform.engine_process import prepare_engine_process

        prepare_engine_process()
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        monkey_patch_torch_reductions()
        opened = MultiprocessingSerializer.deserialize
        return BucketCode(opened, _with(FlattenedTensorBucket), "SGLang's unpickler and FlattenedTensorBucket")
    except Exception as error:
        reason = f"SGLang cannot be imported: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    file = _bucket_file()
    if file is not None:
        return BucketCode(_open, _with(_load(file).FlattenedTensorBucket), f"SGLang's FlattenedTensorBucket; {reason}")
    return BucketCode(_open, _tensors, f"the project's own; {reason}")


def _with(bucket: Any) -> Callable[[torch.Tensor, list[Any]], NamedTensors]:
    return lambda flat, metadata: bucket(flattened_tensor=flat, metadata=metadata).reconstruct_tensors()


def _bucket_file() -> Path | None:
    """SGLang's file with the bucket, found without importing SGLang."""
    try:
        found = importlib.util.find_spec("sglang")
    except (ImportError, ValueError):
        return None
    places = [] if found is None else found.submodule_search_locations or []
    files = (Path(place, "srt", "weight_sync", "tensor_bucket.py") for place in places)
    return next((file for file in files if file.is_file()), None)


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("sglang_tensor_bucket", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _open(payload: str) -> dict[str, Any]:
    # Only this tool's own other process writes here.
    return pickle.load(io.BytesIO(base64.b64decode(payload)))


def _tensors(flat: torch.Tensor, metadata: list[Any]) -> NamedTensors:
    return [(each.name, flat[each.start_idx : each.end_idx].view(each.dtype).reshape(each.shape)) for each in metadata]
