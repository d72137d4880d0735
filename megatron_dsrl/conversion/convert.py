"""HF folder <-> Megatron distributed checkpoint."""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dsrl.common.background import in_background
from megatron_dsrl.common.checksum import checksums
from megatron_dsrl.common.collective import on_first, rank, together
from megatron_dsrl.common.disk import writing
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.conversion import checks
from megatron_dsrl.conversion.distributed_checkpoint_writer import (
    CheckpointLayout,
    ChunkWriter,
    WrittenChunk,
    cut_into_chunks,
    write_metadata,
)
from megatron_dsrl.conversion.verify import verify
from megatron_dsrl.conversion.work import Cast, my_entries, read_ahead, warn, with_progress
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.provenance.inputs import describe_model
from megatron_dsrl.provenance.start import find_out, record_found
from megatron_dsrl.weights.checkpoint_record import CHECKED_FILES, CheckpointRecord, architecture_fields, check_record
from megatron_dsrl.weights.checkpoint_shapes import check_hf_checkpoint, check_megatron_checkpoint
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint, torch_dtype_name
from megatron_dsrl.weights.hf_writer import HfFiles, HfWriter, copy_companions, create_hf_files
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_dsrl.weights.new_folder import new_folder
from megatron_dsrl.weights.reused_memory import ReusedMemory
from megatron_dsrl.weights.table import TableEntry, WeightTable, weight_table


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
    """Convert an HF model, a folder or hub name. Collective over the processes of `conversion_processes`, which share
    the work.

    Every process holds at most two table entries in memory (the largest is the embedding): the one being written, as a
    whole and as a chunk, and the next one. Raises UserError if the architecture, a tensor, the tokenizer, the layout or
    the target is refused, or verification found a difference. The target is then absent or unchanged.
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
        details = _describe_in_background(source, folder)
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


def convert_megatron_to_hf(
    source: Path, target: Path, file_bytes: int, options: ConversionOptions, companions: Path | None = None
) -> None:
    """Convert a Megatron checkpoint, written by this program or by Megatron in any layout. Collective over the
    processes of `conversion_processes`, which share the work.

    Every process holds at most two table entries in memory, as stored and as HF tensors: the one being written and the
    next one. Raises UserError if the architecture, a tensor, the tokenizer or the target is refused, config.json
    differs from the recorded one, or verification found a difference. The target is then absent or unchanged.

    Args:
        file_bytes: maximum size of a weight file.
        companions: folder with config.json and tokenizer; None means the source itself.
    """
    if not source.is_dir():
        raise UserError(f"no such folder: {source}")
    checkpoint, companions = MegatronCheckpoint(source), companions or source
    architecture = checks.read_companion_architecture(source, companions)
    check_record(source, architecture)
    checks.check_expected(architecture, companions, options.expect)
    checks.check_tokenizer(companions, architecture)
    table = weight_table(architecture)
    check_megatron_checkpoint(checkpoint, table)
    stored = {rule.checkpoint_name for rule in table.rules}
    dtypes = {name: dtype for name, dtype in checkpoint.dtypes().items() if name in stored}
    dtype = options.dtype or checks.common_dtype(dtypes, source)
    needed = checks.needed_for_conversion(source, companions, options.expect)
    with new_folder(target, options.overwrite, needed) as partial:
        details = _describe_in_background(str(source), source)
        files = on_first(lambda: create_hf_files(partial, table.hf_shapes(), dtype, file_bytes))
        casts = together(lambda: _write_tensors(checkpoint, table, dtype, files))
        warn(casts, dtype)
        on_first(lambda: copy_companions(companions, partial, dtype))
        record_found(partial, "convert", details.result, print)
        if options.verify:
            verify(hf_folder=partial, megatron_folder=source, source="megatron", dtype=dtype, companions=companions)


def _write_tensors(checkpoint: MegatronCheckpoint, table: WeightTable, dtype: torch.dtype, files: HfFiles) -> Cast:
    """Write this process's share of the weights."""
    cast = Cast(dtype)

    def read(entry: TableEntry, memory: ReusedMemory) -> list[Tensor]:
        tensors = checkpoint.read(entry, memory)
        return [cast(tensor.name, value) for tensor, value in zip(entry.hf, tensors, strict=True)]

    entries = my_entries(table)
    with HfWriter(files) as writer:
        for entry, values in zip(with_progress(entries, dtype, "Megatron -> HF"), read_ahead(entries, read)):
            for tensor, value in zip(entry.hf, values):
                writer.write(tensor.name, value)
    return cast


def _describe_in_background(source: str, folder: Path) -> Future[dict[str, Any]]:
    """Start collecting the details of the provenance record, for `record_found`. Rank 0 only; does nothing on
    others."""
    return in_background(lambda: find_out({"source": lambda: describe_model(source, folder)}) if rank() == 0 else {})
