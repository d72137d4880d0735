"""How a packed row becomes a few padded batches of sequences of similar length, and a row again.

Batches are what attention kernels take; sequences one by one cost a call each. Under context parallelism the queries of
a rank are two chunks of every sequence (model/context_parallel.py), each a batch of its own, over the keys of whole
sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_dsrl.model.context_parallel import zigzag_rows

SHORTEST_IN_BATCH = 0.75
"""A batch holds sequences of at least this fraction of its longest: padding costs at most (1/0.75)^2 = 1.8 times."""


@dataclass(frozen=True)
class Batch:
    """Pieces of a row, side by side, padded on the right to the longest."""

    firsts: tuple[int, ...]
    """Row of each piece's first token."""
    lengths: tuple[int, ...]
    """Tokens of each piece."""

    @property
    def shape(self) -> tuple[int, int]:
        """Pieces, and slots of each."""
        return len(self.lengths), max(self.lengths)


@dataclass(frozen=True)
class SlotMap:
    """How t rows lie in the n slots of some batches, batch after batch."""

    row_of_slot: Tensor
    """[n] int64; a padding slot repeats the last token of its piece."""
    slot_of_row: Tensor
    """[t] int64."""
    padding_slots: Tensor
    """int64, the slots that hold no token of their own."""


@dataclass(frozen=True)
class PackedPlan:
    """A packed row on one rank."""

    batches: tuple[Batch, ...]
    slots: SlotMap


@dataclass(frozen=True)
class QueryChunks:
    """The same chunk of every sequence in a batch."""

    shape: tuple[int, int]
    """Sequences, and slots of each one's chunk."""
    num_keys: int
    """How many of the batch's key slots the chunk may see: the ones up to its end."""
    mask: Tensor | None
    """[sequences, 1, query slots, num_keys] bool, what may be seen; None where all sequences have the same length, and
    the last query simply sees the last key, the one before it the one before, and so on."""


@dataclass(frozen=True)
class ContextParallelPlan:
    """A packed row over several ranks, from one rank's point of view."""

    key_shapes: tuple[tuple[int, int], ...]
    """Of each batch of whole sequences: sequences, and slots of each."""
    keys: SlotMap
    """Rows are those of all ranks, rank after rank, as an all-gather leaves them."""
    chunks: tuple[tuple[QueryChunks, QueryChunks], ...]
    """Of each batch: the earlier and the later chunk that this rank holds."""
    queries: SlotMap
    """Rows are this rank's; slots are those of the chunks, batch after batch."""


@lru_cache(maxsize=8)  # every layer of a micro-batch asks for the same plan, forward, backward and recomputed
def plan_packed(lengths: tuple[int, ...], device: torch.device) -> PackedPlan:
    """The batches of a row of sequences of these lengths."""
    batches = _batches_of_similar_length(lengths)
    return PackedPlan(tuple(batches), _slot_map(batches, sum(lengths), device))


@lru_cache(maxsize=8)
def plan_context_parallel(lengths: tuple[int, ...], size: int, rank: int, device: torch.device) -> ContextParallelPlan:
    """The batches of a row of sequences of these lengths, multiples of 2 * size, of which this rank has its chunks."""
    sequences = _batches_of_similar_length(lengths)
    whole = _slot_map(sequences, sum(lengths), device)
    row_of_gathered = torch.cat([zigzag_rows(lengths, size, other) for other in range(size)]).to(device)
    gathered_of_row = row_of_gathered.argsort()
    numbers = (rank, 2 * size - 1 - rank)
    chunks = tuple(tuple(_query_chunks(batch, size, number, device) for number in numbers) for batch in sequences)
    held = [_held_chunk(batch, size, order) for batch in sequences for order in (0, 1)]
    return ContextParallelPlan(
        key_shapes=tuple(batch.shape for batch in sequences),
        keys=SlotMap(gathered_of_row[whole.row_of_slot], whole.slot_of_row[row_of_gathered], whole.padding_slots),
        chunks=chunks,
        queries=_slot_map(held, sum(lengths) // size, device),
    )


def _batches_of_similar_length(lengths: Sequence[int]) -> list[Batch]:
    firsts = [0]
    for length in lengths:
        firsts.append(firsts[-1] + length)
    longest_first = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    members: list[list[int]] = []
    for i in longest_first:
        if not members or lengths[i] < SHORTEST_IN_BATCH * lengths[members[-1][0]]:
            members.append([])
        members[-1].append(i)
    return [Batch(tuple(firsts[i] for i in batch), tuple(lengths[i] for i in batch)) for batch in members]


def _held_chunk(batch: Batch, size: int, order: int) -> Batch:
    """Where a rank holds its first (0) or second (1) chunk of every sequence of a batch."""
    chunk = tuple(length // (2 * size) for length in batch.lengths)
    return Batch(tuple(first // size + order * c for first, c in zip(batch.firsts, chunk)), chunk)


def _query_chunks(batch: Batch, size: int, number: int, device: torch.device) -> QueryChunks:
    count, longest = batch.shape
    slots = longest // (2 * size)
    num_keys = (number + 1) * slots
    mask = None
    if len(set(batch.lengths)) > 1:
        chunk = torch.tensor(batch.lengths, device=device)[:, None] // (2 * size)
        last_seen = number * chunk + torch.arange(slots, device=device)  # [sequences, query slots]
        mask = (torch.arange(num_keys, device=device) <= last_seen[:, :, None])[:, None]
    return QueryChunks((count, slots), num_keys, mask)


def _slot_map(batches: Sequence[Batch], num_rows: int, device: torch.device) -> SlotMap:
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
