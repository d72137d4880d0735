"""Write a sharded model as an HF folder that Transformers and SGLang load."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_dsrl.errors import UserError
from megatron_dsrl.weights.hf_checkpoint import INDEX_FILE, SINGLE_FILE, torch_dtype_name
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import WeightTable

BUCKET_BYTES = 512 * 2**20
FILE_BYTES = 5 * 2**30
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
"""Files of the source folder that belong to the model beside its weights and its config.json."""


def export_hf_folder(
    chunks: Sequence[nn.Module],
    table: WeightTable,
    source: Path,
    target: Path,
    dtype: torch.dtype,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the model to `target`: safetensors, config.json with the right dtype, tokenizer files. Collective.

    Rank 0 writes into a temporary folder beside the target and renames it at the end: the target is complete or
    absent.

    Args:
        chunks: GPTModel chunks of this pipeline stage, in whatever wrappers.
        table: the model's weight table.
        source: HF folder that config.json and the tokenizer are copied from.
        target: folder to be made; its parents are made as needed.
        dtype: of the written weights.
        file_bytes: the weights are cut into files of at most this size.

    Raises:
        UserError: the target exists already, or its parent cannot be written to. On every rank.
    """
    partial = _make_partial_folder(target)
    buckets = stream_hf_weights(chunks, table, min(BUCKET_BYTES, file_bytes), dtype)
    if partial is None:  # not rank 0
        for _ in buckets:
            pass
    else:
        try:
            _write_weights(buckets, partial, file_bytes)
            _write_companions(source, partial, dtype)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    dist.barrier()  # once it returns, the folder is there for every rank


def _make_partial_folder(target: Path) -> Path | None:
    """The temporary folder on rank 0, None elsewhere. A refusal is raised on every rank."""
    partial, problem = None, None
    if dist.get_rank() == 0:
        try:
            if target.exists():
                raise FileExistsError("it exists already; remove it or choose another folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
            partial.chmod(0o777 & ~_current_umask())  # mkdtemp's are private, the renamed folder should not be
        except OSError as error:
            problem = f"cannot export the model to {target}: {error}"
    shared = [problem]
    dist.broadcast_object_list(shared, src=0)
    if shared[0]:
        raise UserError(shared[0])
    return partial


def _write_weights(buckets: Iterable[list[tuple[str, Tensor]]], folder: Path, file_bytes: int) -> None:
    names_of_file: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0

    def write_pending() -> None:
        save_file(pending, folder / f"part-{len(names_of_file)}", metadata={"format": "pt"})
        names_of_file.append(list(pending))
        pending.clear()

    for bucket in buckets:
        for name, tensor in bucket:
            if pending and pending_bytes + tensor.nbytes > file_bytes:
                write_pending()
                pending_bytes = 0
            pending[name] = tensor.cpu()
            pending_bytes += tensor.nbytes
            total += tensor.nbytes
    write_pending()
    _name_files(folder, names_of_file, total)


def _name_files(folder: Path, names_of_file: Sequence[Sequence[str]], total: int) -> None:
    """HF's names: `model.safetensors`, or numbered files with an index that says which tensor is where."""
    if len(names_of_file) == 1:
        (folder / "part-0").rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for i, names in enumerate(names_of_file):
        file = f"model-{i + 1:05d}-of-{len(names_of_file):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map |= {name: file for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_companions(source: Path, folder: Path, dtype: torch.dtype) -> None:
    config = json.loads((source / "config.json").read_text())
    # Transformers wrote `torch_dtype` up to version 4 and writes `dtype` since; both versions read the older name.
    for field in {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}:
        config[field] = torch_dtype_name(dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
