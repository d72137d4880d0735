"""The core attention by itself, against the definition written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dsrl.model.attention import CoreAttention

HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def core_attention(context_parallel_size: int = 1, groups: ProcessGroupCollection | None = None) -> CoreAttention:
    """Causal self-attention of `HEADS` heads in `GROUPS` groups, of dimension `HEAD_DIM`."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        context_parallel_size=context_parallel_size,
        use_cpu_initialization=True,
    )
    return CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def attention_written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one sequence, [t, heads, d] each."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / HEAD_DIM**0.5
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), value).flatten(1)


def random_qkv(tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, GROUPS, GROUPS)
    return [torch.randn(tokens, n, HEAD_DIM, generator=generator, requires_grad=True) for n in heads]


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum))
def test_packed_rows_of_any_lengths(lengths: list[int]) -> None:
    """Output and gradients, for lengths that differ, repeat, are one or zero."""
    qkv, reference = random_qkv(sum(lengths)), random_qkv(sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    output = core_attention()(*qkv, None, packed_seq_params=params)
    pieces = zip(*(x.split(lengths) for x in reference))
    expected = torch.cat([attention_written_out(*piece) for piece in pieces])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)

    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(qkv, reference):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)


def test_dense_batch() -> None:
    sequences = [random_qkv(9, seed=1), random_qkv(9, seed=2)]
    query, key, value = (torch.stack(x, 1) for x in zip(*sequences))  # [s, b, heads, d]
    output = core_attention()(query, key, value, None)
    expected = torch.stack([attention_written_out(*sequence) for sequence in sequences], 1)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_a_row_that_its_sequences_do_not_cover_is_a_defect() -> None:
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    with pytest.raises(AssertionError, match="cover the packed row"):
        core_attention()(*random_qkv(6), None, packed_seq_params=params)
