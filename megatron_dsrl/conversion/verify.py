"""Compare an HF folder with a Megatron checkpoint: all tensors, and the logits of both models."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from megatron_dsrl.common.collective import rank, together
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.conversion.checks import check_same_architecture, read_companion_architecture
from megatron_dsrl.conversion.work import Cast, my_entries, not_finite_message, overflow_message, with_progress
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.weights.checkpoint_record import check_record
from megatron_dsrl.weights.checkpoint_shapes import check_hf_checkpoint, check_megatron_checkpoint
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint, torch_dtype_name
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_dsrl.weights.reused_memory import ReusedMemory
from megatron_dsrl.weights.table import WeightTable, weight_table

DIFFERENCES_SHOWN = 10


def verify(
    hf_folder: Path,
    megatron_folder: Path,
    source: Literal["hf", "megatron"],
    dtype: torch.dtype | None,
    companions: Path | None = None,
) -> None:
    """Compare both sides and print a summary. Collective over the processes of `conversion_processes`.

    Compares names and shapes, then the dtype and SHA-256 of every tensor after a round trip through the disk and the
    table, then the logits if both models fit in memory. Raises UserError, which names the differences, or the values
    that the dtype cannot hold.

    Args:
        source: the side that the other one was converted from.
        dtype: dtype of the conversion; None means that of the source.
        companions: folder with the config.json of the Megatron side; None means `megatron_folder`.
    """
    architecture = _same_architecture(hf_folder, megatron_folder, companions or megatron_folder)
    table = weight_table(architecture)
    hf, megatron = HfCheckpoint(hf_folder), MegatronCheckpoint(megatron_folder)
    check_hf_checkpoint(hf, table)
    check_megatron_checkpoint(megatron, table)
    parts = together(lambda: _compare_share(table, hf, megatron, source, dtype))
    differences = [line for part in parts for line in part.differences]
    if differences:
        raise UserError(_report(differences, hf_folder, megatron_folder))
    console = Console(quiet=rank() != 0)
    tensors, nbytes = sum(part.tensors for part in parts), sum(part.nbytes for part in parts)
    casts = [part.cast for part in parts]
    if (lost := overflow_message(casts, dtype)) is not None:
        raise UserError(f"verification failed: {lost}")
    console.print(f"verified {tensors} tensors ({nbytes / 1e9:.2f} GB): names, shapes, dtypes and SHA-256 are equal")
    if (not_finite := not_finite_message(casts)) is not None:
        console.print(f"logits not compared: {not_finite}")
        return
    from megatron_dsrl.conversion.logits import compare_logits  # only this needs Megatron, whose import takes seconds

    compare_logits(hf_folder, megatron_folder, architecture, console)


def _same_architecture(hf_folder: Path, megatron_folder: Path, companions: Path) -> Architecture:
    """The architecture of both sides."""
    hf, megatron = read_architecture(hf_folder), read_companion_architecture(megatron_folder, companions)
    check_record(megatron_folder, megatron)
    check_same_architecture(hf, hf_folder, megatron, companions)
    return hf


@dataclass(frozen=True)
class _Comparison:
    """Result for one process's share."""

    tensors: int
    nbytes: int
    differences: list[str]
    cast: Cast


def _compare_share(
    table: WeightTable,
    hf: HfCheckpoint,
    megatron: MegatronCheckpoint,
    source: Literal["hf", "megatron"],
    dtype: torch.dtype | None,
) -> _Comparison:
    tensors, nbytes, differences, cast, memory = 0, 0, [], Cast(dtype), ReusedMemory()
    for entry in with_progress(my_entries(table), dtype or torch.bfloat16, "comparing"):
        memory.free()
        try:
            from_megatron = megatron.read(entry, memory)
        except UserError as error:
            raise UserError(f"verification failed: {error}") from error
        for tensor, megatron_side in zip(entry.hf, from_megatron):
            hf_side = hf.read(tensor.name, memory)
            original, found = (hf_side, megatron_side) if source == "hf" else (megatron_side, hf_side)
            wanted = cast(tensor.name, original)
            tensors, nbytes = tensors + 1, nbytes + wanted.nbytes
            differences += _differences(tensor.name, wanted, found)
    return _Comparison(tensors, nbytes, differences, cast)


def _differences(name: str, wanted: Tensor, found: Tensor) -> list[str]:
    if found.shape != wanted.shape:
        return [f"{name}: shape {list(found.shape)} instead of {list(wanted.shape)}"]
    if found.dtype != wanted.dtype:
        return [f"{name}: {torch_dtype_name(found.dtype)} instead of {torch_dtype_name(wanted.dtype)}"]
    digests = [_digest(wanted), _digest(found)]
    if digests[0] != digests[1]:
        count = int((wanted.view(-1) != found.view(-1)).sum()) or "some (equal as numbers)"
        return [f"{name}: SHA-256 {digests[1][:12]} instead of {digests[0][:12]}; {count} of {wanted.numel()} elements"]
    return []


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _report(differences: list[str], hf_folder: Path, megatron_folder: Path) -> str:
    shown = "\n".join(f"  {line}" for line in differences[:DIFFERENCES_SHOWN])
    more = len(differences) - DIFFERENCES_SHOWN
    rest = f"\n  and {more} more" if more > 0 else ""
    count = "1 tensor differs" if len(differences) == 1 else f"{len(differences)} tensors differ"
    return f"verification of {hf_folder} against {megatron_folder} failed: {count}\n{shown}{rest}"
