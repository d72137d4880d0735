"""HF folder -> Megatron distributed checkpoint."""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from megatron_dsrl.common.checksum import checksums
from megatron_dsrl.common.collective import on_first, rank, together
from megatron_dsrl.common.disk import writing
from megatron_dsrl.conversion import checks
from megatron_dsrl.conversion.cast import Cast, warn
from megatron_dsrl.conversion.distributed_checkpoint_writer import (
    ChunkWriter,
    WrittenChunk,
    cut_into_chunks,
    write_metadata,
)
from megatron_dsrl.conversion.layout import CheckpointLayout
from megatron_dsrl.conversion.verify import verify
from megatron_dsrl.conversion.work import describe_in_background, my_entries, read_ahead, with_progress
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.provenance.start import record_found
from megatron_dsrl.weights.checkpoint_record import CHECKED_FILES, CheckpointRecord, architecture_fields
from megatron_dsrl.weights.checkpoint_shapes import check_hf_checkpoint
from megatron_dsrl.weights.companions import copy_companions
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint, torch_dtype_name
from megatron_dsrl.weights.new_folder import new_folder
from megatron_dsrl.weights.reused_memory import ReusedMemory
from megatron_dsrl.weights.table import TableEntry, WeightTable
from megatron_dsrl.weights.tables import weight_table


@dataclass(frozen=True)
class ConversionOptions:
    """Options of both directions."""

    dtype: torch.dtype | None = None
    """Dtype of the written weights; None keeps that of the source."""
    verify: bool = False
    """Read the result back and compare it with the source before publishing it."""
    overwrite: bool = False
    """Replace an existing target, once the new one is complete."""
    expect: Path | None = None
    """The source must be the model of this HF folder or run YAML."""


def convert_hf_to_megatron(source: str, target: Path, layout: CheckpointLayout, options: ConversionOptions) -> None:
    """Convert an HF model. Collective over the processes of `conversion_processes`, which share the work.

    Every process holds at most two table entries in memory (the largest is the embedding): the one being written, as a
    whole and as a chunk, and the next one.

    Args:
        source: HF folder or hub name.
        target: folder to create.
        layout: the layout to cut chunks for.

    Raises:
        UserError: the architecture, a tensor, the tokenizer, the layout or the target is refused, or verification found
            a difference. The target is then absent or unchanged.
    """
    folder = on_first(lambda: resolve_model_folder(source, "SOURCE"))
    checks.check_is_hf(folder)
    architecture = read_architecture(folder)
    layout.check(architecture)
    checks.check_expected(architecture, folder, options.expect)
    checks.check_tokenizer(folder, architecture)
    table, checkpoint = weight_table(architecture), HfCheckpoint(folder)
    check_hf_checkpoint(checkpoint, table)
    dtypes = {name: dtype for name, dtype in checkpoint.dtypes().items() if name not in table.copies}
    dtype = options.dtype or checks.common_dtype(dtypes, folder)
    needed = checks.needed_for_conversion(folder, folder, options.expect)
    with new_folder(target, options.overwrite, needed) as partial:
        details = describe_in_background(source, folder)
        shares = together(lambda: _write_chunks(checkpoint, table, layout, dtype, partial))
        warn([cast for _, cast in shares], dtype)
        written = list(chain.from_iterable(chunks for chunks, _ in shares))
        record = CheckpointRecord(
            architecture_fields(architecture), torch_dtype_name(dtype), layout.as_record(), source
        )
        on_first(lambda: _complete(partial, folder, table, dtype, record, written))
        record_found(partial, "convert", details.result, print)
        if options.verify:
            verify(hf_folder=folder, megatron_folder=partial, source="hf", dtype=dtype)


def _write_chunks(
    checkpoint: HfCheckpoint, table: WeightTable, layout: CheckpointLayout, dtype: torch.dtype, folder: Path
) -> tuple[list[WrittenChunk], Cast]:
    """Write this process's share of the weights."""
    cast = Cast(dtype)

    def read(entry: TableEntry, memory: ReusedMemory) -> Tensor:
        parts = [cast(tensor.name, checkpoint.read(tensor.name, memory)) for tensor in entry.hf]
        return entry.rule.layout.shard(parts, rank=0, size=1)

    entries = my_entries(table)
    with ChunkWriter(folder, rank()) as writer:
        for entry, whole in zip(with_progress(entries, dtype, "HF -> Megatron"), read_ahead(entries, read)):
            for offsets, chunk in cut_into_chunks(entry, whole, layout):
                writer.write(entry.rule.checkpoint_name, offsets, chunk)
    return writer.written, cast


def _complete(
    partial: Path,
    source: Path,
    table: WeightTable,
    dtype: torch.dtype,
    record: CheckpointRecord,
    written: list[WrittenChunk],
) -> None:
    """Write everything except the weights."""
    write_metadata(partial, table, dtype, written)
    copy_companions(source, partial, dtype)
    with writing(partial):
        files = checksums(partial, [partial / name for name in CHECKED_FILES])
        replace(record, files=files).write(partial)
