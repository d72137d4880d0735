"""Packed rows: several sequences concatenated without padding between them.

Under context parallelism every rank holds two chunks of every sequence (model/context_parallel.py), so each sequence is
padded on the right to a multiple of twice the context-parallel size. No real token attends to that padding, and it is
never scored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.model.context_parallel import assemble, zigzag_rows
from megatron_dsrl.model.routed_experts import decode_routed_experts


@dataclass(frozen=True)
class RowSplit:
    """How the processes of a model replica split a packed row, and which part this process holds."""

    context_parallel_size: int = 1
    context_parallel_rank: int = 0
    sequence_parallel_size: int = 1
    """Tensor-parallel size under sequence parallelism, else 1."""

    @property
    def sequence_multiple(self) -> int:
        """Each sequence is padded to a multiple of this length."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def row_multiple(self) -> int:
        """The whole row is padded to a multiple of this length."""
        return math.lcm(self.sequence_multiple, self.context_parallel_size * self.sequence_parallel_size)

    def padded(self, length: int) -> int:
        """Length of a sequence with its padding."""
        return -(-length // self.sequence_multiple) * self.sequence_multiple


@dataclass(frozen=True)
class RoutedExperts:
    """The experts of a batch's tokens, and the sizes of the model they belong to."""

    encoded: Sequence[str]
    """For each sequence, the experts of all tokens but the last; see `model.routed_experts`."""
    layers: int
    """Layers of the whole model."""
    experts_per_token: int

    def for_row(self, sequences: Sequence[ScoredSequence], indices: Sequence[int], starts: Sequence[int]) -> Tensor:
        """uint8 [tokens of the whole row, layers, experts per token].

        The last token of a sequence and padding predict nothing that is scored; they are routed to the first experts.
        """
        row = torch.arange(self.experts_per_token, dtype=torch.uint8).repeat(starts[-1], self.layers, 1)
        for start, i in zip(starts, indices):
            experts = decode_routed_experts(self.encoded[i], self.layers, self.experts_per_token)
            if len(experts) != len(sequences[i].token_ids) - 1:
                raise ValueError(
                    f"routed experts of {len(experts)} tokens for a sequence of {len(sequences[i].token_ids)} tokens, "
                    f"expected {len(sequences[i].token_ids) - 1}; they were recorded with a different model"
                )
            row[start : start + len(experts)] = experts
        return row


@dataclass(frozen=True)
class PackedRow:
    """A packed row of T tokens on this rank; S of them predict a scored token. Tensors are on the model's device.

    Without context parallelism T and S count the whole row, with it this rank's part.
    """

    indices: tuple[int, ...]
    """Indices of the row's sequences in the batch, in order."""
    token_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64, starting from 0 in every sequence."""
    is_padding: Tensor
    """[1, T] bool."""
    sequence_starts: Tensor
    """[num_sequences + 1] int32, cumulative lengths in the whole row including padding; attention never crosses these
    bounds."""
    longest: int
    """Length of the longest whole sequence."""
    predicting_positions: Tensor
    """[S] int64: for each scored token, the position on this rank that predicts it, the one before it."""
    targets: Tensor
    """[S] int64: ids of the scored tokens."""
    places: Tensor
    """[S] int64: their indices among all scored tokens of the row, in sequence order."""
    num_scored: tuple[int, ...]
    """Scored tokens of each sequence, in order, over all ranks."""
    routed_experts: Tensor | None = None
    """[T, layers of the whole model, experts per token] uint8, on the CPU: experts of every token. None lets the
    routers choose."""

    def assemble(self, values: Tensor) -> Tensor:
        """Gather values [..., S] of this rank's scored tokens into [..., sum(num_scored)] of all, on every rank.

        Differentiable; see `model.context_parallel.assemble`.
        """
        if parallel_state.get_context_parallel_world_size() == 1:
            return values
        return assemble(values, self.places, sum(self.num_scored), parallel_state.get_context_parallel_group())


SHORTEST_ROW = 2
"""Tokens in an empty row. Transformer Engine refuses a row of one token on a rank with one key-value head, because the
strides of queries, keys and values are then ambiguous."""


def pack(
    sequences: Sequence[ScoredSequence],
    indices: Sequence[int],
    split: RowSplit,
    device: torch.device,
    routed_experts: RoutedExperts | None = None,
) -> PackedRow:
    """Pack the sequences at these indices into a row.

    The row is filled up to the multiple required by the split with a final unscored filler sequence. An empty row
    consists of the filler only. `routed_experts` are those of the whole batch.
    """
    chosen = [sequences[i] for i in indices]
    lengths = [split.padded(len(sequence.token_ids)) for sequence in chosen]
    filling = -sum(lengths) % split.row_multiple if lengths else max(split.row_multiple, SHORTEST_ROW)
    lengths += [filling] if filling else []
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    token_ids, predicted, is_padding = _whole_row(chosen, starts)
    mine = zigzag_rows(lengths, split.context_parallel_size, split.context_parallel_rank)
    predicting = (predicted[mine] >= 0).nonzero().flatten()
    places = predicted[mine][predicting]
    # A rank holds the chunks of a sequence in order, so its positions increase.
    targets = torch.cat(
        [torch.zeros(0, dtype=torch.int64), *(one.token_tensor[one.scored_positions] for one in chosen)]
    )
    experts = None if routed_experts is None else routed_experts.for_row(sequences, indices, starts)[mine]
    return PackedRow(
        indices=tuple(indices),
        token_ids=token_ids[mine][None].to(device),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[mine][None].to(device),
        is_padding=is_padding[mine][None].to(device),
        sequence_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        longest=max(lengths),
        predicting_positions=predicting.to(device),
        targets=targets[places].to(device),
        places=places.to(device),
        num_scored=tuple(sequence.num_scored for sequence in chosen),
        routed_experts=experts,
    )


def _whole_row(sequences: Sequence[ScoredSequence], starts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Per position of the row: token id (0 for padding), index of the scored token it predicts (or -1), and whether it
    is padding."""
    token_ids = torch.zeros(starts[-1], dtype=torch.int64)
    predicted = torch.full_like(token_ids, -1)
    is_padding = torch.ones_like(token_ids, dtype=torch.bool)
    scored = 0
    for start, sequence in zip(starts, sequences):
        end = start + len(sequence.token_ids)
        token_ids[start:end] = sequence.token_tensor
        is_padding[start:end] = False
        predicted[start + sequence.scored_positions - 1] = torch.arange(scored, scored + sequence.num_scored)
        scored += sequence.num_scored
    return token_ids, predicted, is_padding
