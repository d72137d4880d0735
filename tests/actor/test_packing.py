"""Packed rows: their filler, in one process."""

import pytest
import torch

from megatron_dsrl.actor.packing import SHORTEST_ROW, RowSplit, pack
from megatron_dsrl.algorithms.spaces import ScoredSequence

SEQUENCE = ScoredSequence((5, 6, 7), num_context=1)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("split", "tokens"),
    [
        (RowSplit(), SHORTEST_ROW),  # not 1, which Transformer Engine refuses
        (RowSplit(sequence_parallel_size=8), 8),
        (RowSplit(context_parallel_size=2, sequence_parallel_size=2), 4 // 2),
    ],
)
def test_an_empty_row_has_a_filler_of_at_least_two_tokens_per_process(split, tokens) -> None:
    row = pack([SEQUENCE], [], split, CPU)
    assert row.token_ids.numel() == tokens and row.is_padding.all()
    assert row.targets.numel() == 0 and row.num_scored == ()


def test_only_an_empty_row_gets_more_than_the_split_needs() -> None:
    short = ScoredSequence((5,), num_context=1)
    assert pack([short], [0], RowSplit(), CPU).token_ids.numel() == 1
    row = pack([SEQUENCE], [0], RowSplit(), CPU)
    assert row.token_ids.flatten().tolist() == [5, 6, 7] and row.targets.tolist() == [6, 7]
