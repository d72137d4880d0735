"""Plan how to split a packed row into a few padded batches of sequences of similar length, and back.

Attention kernels take batches; one call per sequence would be slow. Under context parallelism a rank's queries are two
chunks of every sequence (model/context_parallel.py), each in a separate batch, attending to the keys of whole
sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_dsrl.model.context_parallel import zigzag_rows

SHORTEST_IN_BATCH = 0.75
"""Sequences in a batch have at least this fraction of its longest length: padding costs at most a factor of (1/0.75)^2
= 1.8."""


@dataclass(frozen=True)
class PaddedBatch:
    """Pieces of a row as a batch, right-padded to the longest."""

    firsts: tuple[int, ...]
    """Row index of each piece's first token."""
    lengths: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(number of pieces, slots per piece)."""
        return len(self.lengths), max(self.lengths)


@dataclass(frozen=True)
class SlotMap:
    """Mapping between t rows and the n slots of consecutive batches."""

    row_of_slot: Tensor
    """[n] int64; a padding slot repeats the last token of its piece."""
    slot_of_row: Tensor
    """[t] int64."""
    padding_slots: Tensor
    """int64, the slots that are padding."""


@dataclass(frozen=True)
class PackedPlan:
    """A packed row on one rank."""

    batches: tuple[PaddedBatch, ...]
    slots: SlotMap


@dataclass(frozen=True)
class QueryChunks:
    """The same chunk of every sequence in a batch."""

    shape: tuple[int, int]
    """(number of sequences, slots per chunk)."""
    num_keys: int
    """Number of key slots the chunk may attend to: those up to its end."""
    mask: Tensor | None
    """[sequences, 1, query slots, num_keys] bool attention mask; None if all sequences have the same length, so that
    the mask is causal with the last query aligned to the last key."""


@dataclass(frozen=True)
class ContextParallelPlan:
    """A packed row over several ranks, from one rank's point of view."""

    key_shapes: tuple[tuple[int, int], ...]
    """For each batch of whole sequences: (number of sequences, slots per sequence)."""
    keys: SlotMap
    """Rows are those of all ranks in rank order, as returned by an all-gather."""
    chunks: tuple[tuple[QueryChunks, QueryChunks], ...]
    """For each batch: the earlier and the later chunk that this rank holds."""
    queries: SlotMap
    """Rows are this rank's; slots are those of the chunks, in batch order."""


@lru_cache(maxsize=8)  # all layers of a micro-batch use the same plan, in forward, backward and recomputation
def plan_packed(lengths: tuple[int, ...], device: torch.device) -> PackedPlan:
    batches = _batches_of_similar_length(lengths)
    return PackedPlan(tuple(batches), _slot_map(batches, sum(lengths), device))


@lru_cache(maxsize=8)
def plan_context_parallel(lengths: tuple[int, ...], size: int, rank: int, device: torch.device) -> ContextParallelPlan:
    """Plan the batches for this rank's chunks of a row; the sequence lengths are multiples of 2 * size."""
    sequences = _batches_of_similar_length(lengths)
    whole = _slot_map(sequences, sum(lengths), device)
    row_of_gathered = torch.cat([zigzag_rows(lengths, size, other) for other in range(size)]).to(device)
    gathered_of_row = row_of_gathered.argsort()
    chunks = tuple(
        (_query_chunks(batch, size, rank, device), _query_chunks(batch, size, 2 * size - 1 - rank, device))
        for batch in sequences
    )
    held = [_held_chunk(batch, size, order) for batch in sequences for order in (0, 1)]
    return ContextParallelPlan(
        key_shapes=tuple(batch.shape for batch in sequences),
        keys=SlotMap(gathered_of_row[whole.row_of_slot], whole.slot_of_row[row_of_gathered], whole.padding_slots),
        chunks=chunks,
        queries=_slot_map(held, sum(lengths) // size, device),
    )


def _batches_of_similar_length(lengths: Sequence[int]) -> list[PaddedBatch]:
    firsts = [0]
    for length in lengths:
        firsts.append(firsts[-1] + length)
    longest_first = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    members: list[list[int]] = []
    for i in longest_first:
        if not members or lengths[i] < SHORTEST_IN_BATCH * lengths[members[-1][0]]:
            members.append([])
        members[-1].append(i)
    return [PaddedBatch(tuple(firsts[i] for i in batch), tuple(lengths[i] for i in batch)) for batch in members]


def _held_chunk(batch: PaddedBatch, size: int, order: int) -> PaddedBatch:
    """Position of a rank's first (0) or second (1) chunk of every sequence of a batch."""
    chunk = tuple(length // (2 * size) for length in batch.lengths)
    return PaddedBatch(tuple(first // size + order * c for first, c in zip(batch.firsts, chunk)), chunk)


def _query_chunks(batch: PaddedBatch, size: int, number: int, device: torch.device) -> QueryChunks:
    count, longest = batch.shape
    slots = longest // (2 * size)
    num_keys = (number + 1) * slots
    mask = None
    if len(set(batch.lengths)) > 1:
        chunk = torch.tensor(batch.lengths, device=device)[:, None] // (2 * size)
        last_seen = number * chunk + torch.arange(slots, device=device)  # [sequences, query slots]
        mask = (torch.arange(num_keys, device=device) <= last_seen[:, :, None])[:, None]
    return QueryChunks((count, slots), num_keys, mask)


def _slot_map(batches: Sequence[PaddedBatch], num_rows: int, device: torch.device) -> SlotMap:
    rows, real = [], []
    for batch in batches:
        offsets = torch.arange(batch.shape[1])
        first, length = torch.tensor(batch.firsts)[:, None], torch.tensor(batch.lengths)[:, None]
        rows.append((first + offsets.minimum(length - 1)).flatten())
        real.append((offsets < length).flatten())
    row_of_slot, is_real = torch.cat(rows), torch.cat(real)
    slot_of_row = torch.empty(num_rows, dtype=torch.int64)
    slot_of_row[row_of_slot[is_real]] = is_real.nonzero().flatten()
    padding_slots = (~is_real).nonzero().flatten()
    return SlotMap(row_of_slot.to(device), slot_of_row.to(device), padding_slots.to(device))
