"""A micro-batch: several sequences packed into one row, without padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience


@dataclass(frozen=True)
class MicroBatch:
    """A packed row of T tokens, of which S are scored."""

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
    advantages: Tensor
    """[S] float32."""
    weights: Tensor
    """[S] float32: the loss is the sum of weight * token loss over all micro-batches of all ranks."""
    engine_log_probs: Tensor
    """[S] float32."""
    old_log_probs: Tensor | None
    """[S] float32, or None where the update is on-policy."""
    num_scored: tuple[int, ...]
    """Scored tokens of each sequence, in order; they sum to S."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return MicroBatch(**moved)


def pack(experience: Experience, weights: Tensor, indices: Sequence[int], multiple_of: int) -> MicroBatch:
    """Pack the named sequences.

    The row is filled up to a multiple (of the tensor-parallel size, under sequence parallelism) by a last sequence of
    its own that is not scored. An empty micro-batch is such a filling sequence only.

    Args:
        experience: the sequences of the optimizer step.
        weights: [num_sequences] float32, the loss weight of each sequence's tokens.
        indices: which sequences.
        multiple_of: what the row length is a multiple of.
    """
    sequences = [experience.sequences[i] for i in indices]
    lengths = [len(sequence.token_ids) for sequence in sequences]
    filling = -sum(lengths) % multiple_of if lengths else multiple_of
    all_lengths = lengths + ([filling] if filling else [])
    starts = [0]
    for length in all_lengths:
        starts.append(starts[-1] + length)
    num_scored = tuple(sequence.num_scored for sequence in sequences)
    repeat = torch.tensor(num_scored, dtype=torch.int64)
    chosen = experience.select(indices)
    return MicroBatch(
        token_ids=torch.tensor([[t for s in sequences for t in s.token_ids] + [0] * filling], dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in all_lengths])[None],
        sequence_starts=torch.tensor(starts, dtype=torch.int32),
        longest=max(all_lengths),
        predicting_positions=_concatenate(
            [torch.arange(a + s.num_context - 1, a + len(s.token_ids) - 1) for a, s in zip(starts, sequences)],
            torch.int64,
        ),
        targets=torch.tensor([t for s in sequences for t in s.token_ids[s.num_context :]], dtype=torch.int64),
        advantages=chosen.advantages.repeat_interleave(repeat),
        weights=weights[list(indices)].repeat_interleave(repeat),
        engine_log_probs=_concatenate(chosen.engine_log_probs, torch.float32),
        old_log_probs=None if chosen.old_log_probs is None else _concatenate(chosen.old_log_probs, torch.float32),
        num_scored=num_scored,
    )


def _concatenate(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=dtype), *parts])
