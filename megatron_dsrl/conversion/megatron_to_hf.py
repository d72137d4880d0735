"""Megatron distributed checkpoint -> HF folder."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_dsrl.common.collective import on_first, together
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.conversion import checks
from megatron_dsrl.conversion.cast import Cast, warn
from megatron_dsrl.conversion.hf_to_megatron import ConversionOptions
from megatron_dsrl.conversion.verify import verify
from megatron_dsrl.conversion.work import describe_in_background, my_entries, read_ahead, with_progress
from megatron_dsrl.provenance.start import record_found
from megatron_dsrl.weights.checkpoint_record import check_record
from megatron_dsrl.weights.checkpoint_shapes import check_megatron_checkpoint
from megatron_dsrl.weights.companions import copy_companions
from megatron_dsrl.weights.hf_writer import HfFiles, HfWriter, create_hf_files
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_dsrl.weights.new_folder import new_folder
from megatron_dsrl.weights.reused_memory import ReusedMemory
from megatron_dsrl.weights.table import TableEntry, WeightTable
from megatron_dsrl.weights.tables import weight_table


def convert_megatron_to_hf(
    source: Path, target: Path, file_bytes: int, options: ConversionOptions, companions: Path | None = None
) -> None:
    """Convert a Megatron checkpoint. Collective over the processes of `conversion_processes`, which share the work.

    Every process holds at most two table entries in memory, as stored and as HF tensors: the one being written and the
    next one.

    Args:
        source: checkpoint folder, written by this program or by Megatron in any layout.
        target: folder to create.
        file_bytes: maximum size of a weight file.
        companions: folder with config.json and tokenizer; None means the source itself.

    Raises:
        UserError: the architecture, a tensor, the tokenizer or the target is refused, config.json differs from the
            recorded one, or verification found a difference. The target is then absent or unchanged.
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
        details = describe_in_background(str(source), source)
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
