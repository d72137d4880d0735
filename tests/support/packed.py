"""Packed rows as Megatron's attention takes them."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def packed(lengths: list[int]) -> PackedSeqParams:
    """A row of sequences of these lengths, without padding."""
    bounds, longest = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths)
    return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
