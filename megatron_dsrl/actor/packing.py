"""A packed row: several sequences one after the other, without padding between them.

Under context parallelism every rank holds two chunks of every sequence (model/context_parallel.py), for which each
sequence is padded on its right to a multiple of twice the context-parallel size. No real token looks at that padding,
and nothing of it is scored.
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
    """How the processes of a model replica split a packed row, and which part is this one's."""

    context_parallel_size: int = 1
    context_parallel_rank: int = 0
    sequence_parallel_size: int = 1
    """Tensor-parallel size under sequence parallelism, else 1."""

    @property
    def sequence_multiple(self) -> int:
        """What the length of every sequence is padded to a multiple of."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def row_multiple(self) -> int:
        """What the length of the whole row is a multiple of."""
        return math.lcm(self.sequence_multiple, self.context_parallel_size * self.sequence_parallel_size)

    def padded(self, length: int) -> int:
        """Tokens that a sequence takes."""
        return -(-length // self.sequence_multiple) * self.sequence_multiple


@dataclass(frozen=True)
class RoutedExperts:
    """The experts of a batch's tokens, and the model that they belong to."""

    of_sequences: Sequence[str]
    """Of each sequence's tokens but the last; see `algorithms.routed_experts`."""
    layers: int
    """Of the whole model."""
    experts_per_token: int

    def of_row(self, sequences: Sequence[ScoredSequence], indices: Sequence[int], starts: Sequence[int]) -> Tensor:
        """uint8 [tokens of the whole row, layers, experts per token].

        Neither a sequence's last token nor padding predicts anything that is scored: they go to the first experts.
        """
        row = torch.arange(self.experts_per_token, dtype=torch.uint8).repeat(starts[-1], self.layers, 1)
        for start, i in zip(starts, indices):
            experts = decode_routed_experts(self.of_sequences[i], self.layers, self.experts_per_token)
            if len(experts) != len(sequences[i].token_ids) - 1:
                raise ValueError(
                    f"experts of {len(experts)} tokens for a sequence of {len(sequences[i].token_ids)}, whose last one "
                    "needs none; they were recorded with another model"
                )
            row[start : start + len(experts)] = experts
        return row


@dataclass(frozen=True)
class PackedRow:
    """A packed row of T tokens on this rank, of which S predict a scored token. Tensors are on the model's device.

    Without context parallelism T and S count the whole row. With it they count this rank's part of it.
    """

    indices: tuple[int, ...]
    """Which sequences of the batch these are, in the order of the row."""
    token_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64, from 0 in every sequence."""
    is_padding: Tensor
    """[1, T] bool."""
    sequence_starts: Tensor
    """[num_sequences + 1] int32, cumulative lengths in the whole row, padding included; attention never crosses
    them."""
    longest: int
    """Tokens of the longest whole sequence."""
    predicting_positions: Tensor
    """[S] int64: the position on this rank whose output predicts each scored token, the one before it."""
    targets: Tensor
    """[S] int64: the scored tokens."""
    places: Tensor
    """[S] int64: their numbers among all scored tokens of the row, sequence after sequence."""
    num_scored: tuple[int, ...]
    """Scored tokens of each sequence, in order, whichever rank predicts them."""
    routed_experts: Tensor | None = None
    """[T, layers of the whole model, experts per token] uint8, on the CPU: where every token is sent to. None: the
    routers choose."""

    def assemble(self, values: Tensor) -> Tensor:
        """Values [..., S] of this rank's scored tokens as [..., sum(num_scored)] of all, on every rank.

        Differentiable; see `model.context_parallel.assemble`.
        """
        if parallel_state.get_context_parallel_world_size() == 1:
            return values
        return assemble(values, self.places, sum(self.num_scored), parallel_state.get_context_parallel_group())


def pack(
    sequences: Sequence[ScoredSequence],
    indices: Sequence[int],
    split: RowSplit,
    device: torch.device,
    routed_experts: RoutedExperts | None = None,
) -> PackedRow:
    """Pack the named sequences.

    The row is filled up to the multiple that the split needs by a last sequence of its own that is not scored. An empty
    row is such a filling sequence only.

    Args:
        sequences: of the whole batch.
        indices: which of them.
        split: how processes share the row.
        device: of the tensors.
        routed_experts: of the whole batch; None leaves the choice to the routers.
    """
    chosen = [sequences[i] for i in indices]
    lengths = [split.padded(len(sequence.token_ids)) for sequence in chosen]
    filling = -sum(lengths) % split.row_multiple if lengths else split.row_multiple
    lengths += [filling] if filling else []
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    token_ids, predicted, is_padding = _whole_row(chosen, starts)
    mine = zigzag_rows(lengths, split.context_parallel_size, split.context_parallel_rank)
    predicting = (predicted[mine] >= 0).nonzero().flatten()
    places = predicted[mine][predicting]
    # A rank holds a sequence's chunks in their order, so its places count up.
    targets = torch.cat([torch.zeros(0, dtype=torch.int64), *map(_scored_tokens, chosen)])
    experts = None if routed_experts is None else routed_experts.of_row(sequences, indices, starts)[mine]
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
    """Token ids of the row, 0 where padded; the number of the scored token that each position predicts, or -1; and
    whether it is padding."""
    token_ids = torch.zeros(starts[-1], dtype=torch.int64)
    predicted = torch.full_like(token_ids, -1)
    is_padding = torch.ones_like(token_ids, dtype=torch.bool)
    scored = 0
    for start, sequence in zip(starts, sequences):
        end = start + len(sequence.token_ids)
        token_ids[start:end] = torch.tensor(sequence.token_ids)
        is_padding[start:end] = False
        predicted[start + sequence.scored_positions - 1] = torch.arange(scored, scored + sequence.num_scored)
        scored += sequence.num_scored
    return token_ids, predicted, is_padding


def _scored_tokens(sequence: ScoredSequence) -> Tensor:
    return torch.tensor(sequence.token_ids, dtype=torch.int64)[sequence.scored_positions]
