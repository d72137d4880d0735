"""Two real processes hold a packed row together: attention, its gradients, and what is assembled from both."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.attention import CoreAttention
from megatron_dsrl.model.context_parallel import assemble, zigzag_rows
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.model.test_attention import GROUPS, HEAD_DIM, HEADS, attention_written_out, random_qkv
from tests.support.distributed import run_distributed

LENGTHS = {
    "one sequence": [12],
    "equal lengths": [8, 8, 8],
    "similar lengths, which are padded": [24, 20, 24, 16, 20],
    "lengths far apart": [4, 40, 8, 0, 36, 4],
}


def core_attention() -> CoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        context_parallel_size=2,
        use_cpu_initialization=True,
    )
    groups = ProcessGroupCollection(cp=parallel_state.get_context_parallel_group())
    return CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def attend_with_two_processes() -> dict[str, Any]:
    """This rank's rows, output, and gradients of sum(output * weights), for every row of LENGTHS and a dense batch."""
    results = {}
    with parallel_layout(ParallelConfig(context_parallel_size=2, collective_timeout_seconds=60), seed=1):
        attention, rank = core_attention(), dist.get_rank()
        for name, lengths in LENGTHS.items():
            rows = zigzag_rows(lengths, 2, rank)
            local = [x.detach()[rows].requires_grad_() for x in random_qkv(sum(lengths))]
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
            output = attention(*local, None, packed_seq_params=params)
            (output * weights_of(sum(lengths))[rows]).sum().backward()
            results[name] = [x.tolist() for x in (rows, output, *(x.grad for x in local))]
        rows = zigzag_rows([8], 2, rank)
        batch = (torch.stack(x, 1)[rows] for x in zip(random_qkv(8, seed=1), random_qkv(8, seed=2)))
        results["dense"] = [rows.tolist(), attention(*batch, None).tolist()]
        part = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, rank : rank + 1].requires_grad_()
        whole = assemble(part, torch.tensor([1 - rank]), 2, parallel_state.get_context_parallel_group())
        (whole**2).sum().backward()
        results["assembled"] = [whole.tolist(), part.grad.tolist()]
    destroy_parallel()
    return results


def weights_of(tokens: int) -> Tensor:
    return torch.randn(tokens, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(attend_with_two_processes, 2)


@pytest.mark.parametrize("name", LENGTHS)
def test_packed_rows(ranks, name):
    """Output and gradients of queries, keys and values are those of one process, for every token of both ranks."""
    lengths, reference = LENGTHS[name], random_qkv(sum(LENGTHS[name]))
    pieces = zip(*(x.split(lengths) for x in reference))
    expected = torch.cat([attention_written_out(*piece) for piece in pieces])
    (expected * weights_of(sum(lengths))).sum().backward()
    seen = []
    for rank in ranks:
        rows, output, *gradients = (torch.tensor(x) for x in rank[name])
        seen += rows.tolist()
        torch.testing.assert_close(output, expected[rows], rtol=0, atol=1e-5)
        for gradient, whole in zip(gradients, reference):
            torch.testing.assert_close(gradient, whole.grad[rows], rtol=0, atol=1e-5)
    assert sorted(seen) == list(range(sum(lengths)))


def test_dense_batch(ranks):
    expected = torch.stack([attention_written_out(*random_qkv(8, seed=seed)) for seed in (1, 2)], 1)
    for rank in ranks:
        rows, output = (torch.tensor(x) for x in rank["dense"])
        torch.testing.assert_close(output, expected[rows], rtol=0, atol=1e-5)


def test_assembled_values_are_whole_everywhere_and_their_gradient_counts_once(ranks):
    """Both ranks square the whole; each part's gradient is that of one square, not of two."""
    for rank, gradient in zip(ranks, ([[2.0], [6.0]], [[4.0], [8.0]])):
        assert rank["assembled"] == [[[2.0, 1.0], [4.0, 3.0]], gradient]


def test_the_split_is_causally_balanced():
    """Two sequences over two ranks: the outer chunks of each on the first, the inner ones on the second."""
    assert zigzag_rows([8, 4], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_rows([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag_rows([3], 1, 0).tolist() == [0, 1, 2]
    with pytest.raises(AssertionError, match="multiple of 2"):
        zigzag_rows([6], 2, 0)
