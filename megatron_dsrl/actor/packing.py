"""A packed row: several sequences one after the other, without padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dsrl.algorithms.spaces import ScoredSequence


@dataclass(frozen=True)
class PackedRow:
    """A packed row of T tokens, of which S are scored. Tensors are on the model's device."""

    indices: tuple[int, ...]
    """Which sequences of the batch these are, in the order of the row."""
    token_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64, from 0 in every sequence."""
    sequence_starts: Tensor
    """[num_sequences + 1] int32, cumulative lengths; attention never crosses them."""
    longest: int
    """Tokens of the longest sequence."""
    predicting_positions: Tensor
    """[S] int64: the row position whose logits predict each scored token, the one before it."""
    targets: Tensor
    """[S] int64: the scored tokens."""
    num_scored: tuple[int, ...]
    """Scored tokens of each sequence, in order; they sum to S."""


def pack(
    sequences: Sequence[ScoredSequence], indices: Sequence[int], multiple_of: int, device: torch.device
) -> PackedRow:
    """Pack the named sequences.

    The row is filled up to a multiple (of the tensor-parallel size, under sequence parallelism) by a last sequence of
    its own that is not scored. An empty row is such a filling sequence only.

    Args:
        sequences: of the whole batch.
        indices: which of them.
        multiple_of: what the row length is a multiple of.
        device: of the tensors.
    """
    chosen = [sequences[i] for i in indices]
    lengths = [len(sequence.token_ids) for sequence in chosen]
    filling = -sum(lengths) % multiple_of if lengths else multiple_of
    all_lengths = lengths + ([filling] if filling else [])
    starts = [0]
    for length in all_lengths:
        starts.append(starts[-1] + length)
    predicting = [torch.arange(a + s.num_context - 1, a + len(s.token_ids) - 1) for a, s in zip(starts, chosen)]
    targets = [t for s in chosen for t in s.token_ids[s.num_context :]]
    return PackedRow(
        indices=tuple(indices),
        token_ids=torch.tensor([[t for s in chosen for t in s.token_ids] + [0] * filling], device=device),
        position_ids=torch.cat([torch.arange(length) for length in all_lengths])[None].to(device),
        sequence_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        longest=max(all_lengths),
        predicting_positions=torch.cat([torch.zeros(0, dtype=torch.int64), *predicting]).to(device),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        num_scored=tuple(sequence.num_scored for sequence in chosen),
    )
