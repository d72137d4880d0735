"""Write a sharded model as an HF folder that Transformers and SGLang can load."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from megatron_dsrl.common.collective import on_first, rank, together
from megatron_dsrl.weights.hf_writer import ADAPTER_FOLDER, FILE_BYTES, HfWriter, copy_companions, create_hf_files
from megatron_dsrl.weights.new_folder import new_folder
from megatron_dsrl.weights.peft import PeftAdapters, write_peft_folder
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import WeightTable

BUCKET_BYTES = 512 * 2**20


def export_hf_folder(
    chunks: Sequence[nn.Module],
    table: WeightTable,
    source: Path,
    target: Path,
    dtype: torch.dtype,
    file_bytes: int = FILE_BYTES,
    adapters: PeftAdapters | None = None,
) -> None:
    """Write the model to `target`: safetensors, config.json with the right dtype, tokenizer files. Collective.

    With LoRA the weights are merged, and the adapters alone are in `adapter/` as PEFT's files. (Beside the weights
    Transformers would take them for the model.) The target is either complete or absent; see `new_folder`. Raises
    UserError, on every rank, if it already exists or cannot be written.

    Args:
        chunks: GPTModel chunks of this pipeline stage, wrapped or not.
        source: HF folder to copy config.json and the tokenizer from.
    """

    def write_stream() -> None:
        """Only rank 0 writes. If it fails, it still finishes the stream, since other ranks wait in its collectives."""
        buckets = stream_hf_weights(chunks, table, BUCKET_BYTES, dtype)
        try:
            if rank() == 0:
                with HfWriter(create_hf_files(folder, table.hf_shapes(), dtype, file_bytes)) as writer:
                    for name, tensor in chain.from_iterable(buckets):
                        writer.write(name, tensor.cpu())
        except Exception:
            _exhaust(buckets)
            raise
        _exhaust(buckets)

    with new_folder(target) as folder:
        together(write_stream)
        on_first(lambda: copy_companions(source, folder, dtype))
        if adapters:
            write_peft_folder(chunks, adapters, folder / ADAPTER_FOLDER, dtype, BUCKET_BYTES)


def _exhaust(buckets: Iterator[object]) -> None:
    for _ in buckets:
        pass
