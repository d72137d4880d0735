"""Two real processes hold a packed row together: attention, its gradients, and what is assembled from both."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import build_model
from megatron_dsrl.model.context_parallel import assemble, zigzag_rows
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.weights.load import load_hf_weights
from megatron_dsrl.weights.table import weight_table
from tests.model.test_attention import HEAD_DIM, HEADS, attention_written_out, core_attention, random_qkv
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3

LENGTHS = {
    "one sequence": [12],
    "equal lengths": [8, 8, 8],
    "similar lengths, which are padded": [24, 20, 24, 16, 20],
    "lengths far apart": [4, 40, 8, 0, 36, 4],
}


def attend_with_two_processes(folder: Path) -> dict[str, Any]:
    """This rank's rows, output, and gradients of sum(output * weights), for every row of LENGTHS and a dense batch."""
    results = {}
    with parallel_layout(ParallelConfig(context_parallel_size=2, collective_timeout_seconds=60), seed=1):
        groups = ProcessGroupCollection(cp=parallel_state.get_context_parallel_group())
        attention, rank = core_attention(context_parallel_size=2, groups=groups), dist.get_rank()
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
        results["reached"] = reached_by_the_second_sequence(folder)
    destroy_parallel()
    return results


def reached_by_the_second_sequence(folder: Path) -> list[int]:
    """This rank's tokens on whose embedding the logits of the second of three sequences depend."""
    architecture, lengths = read_architecture(folder), [12, 8, 16]
    model = ModelConfig(path=str(folder), dtype="float32")
    (chunk,) = build_model(architecture, model, ParallelConfig(context_parallel_size=2))
    load_hf_weights([chunk], weight_table(architecture), folder)
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)  # [t, 1, h]

    chunk.embedding.register_forward_hook(keep)
    rows = zigzag_rows(lengths, 2, dist.get_rank())
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=16, max_seqlen_kv=16
    )
    tokens = torch.randint(0, 101, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    logits = chunk(tokens[rows][None], None, None, packed_seq_params=params)
    logits[:, (rows >= 12) & (rows < 20)].square().sum().backward()
    return rows[embedded[0].grad.flatten(1).abs().sum(1) > 0].tolist()


def weights_of(tokens: int) -> Tensor:
    return torch.randn(tokens, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_qwen3(folder, tied=False, vocab_size=101)
    return run_distributed(attend_with_two_processes, 2, folder, timeout_seconds=240)


@pytest.mark.parametrize("name", LENGTHS)
def test_packed_rows(ranks, name) -> None:
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


def test_dense_batch(ranks) -> None:
    expected = torch.stack([attention_written_out(*random_qkv(8, seed=seed)) for seed in (1, 2)], 1)
    for rank in ranks:
        rows, output = (torch.tensor(x) for x in rank["dense"])
        torch.testing.assert_close(output, expected[rows], rtol=0, atol=1e-5)


def test_no_sequence_of_a_packed_row_sees_another(ranks) -> None:
    """The gradient by the other sequences' embeddings is exactly zero on both ranks; by its own tokens it is not."""
    assert sorted(ranks[0]["reached"] + ranks[1]["reached"]) == list(range(12, 20))


def test_assembled_values_are_whole_everywhere_and_their_gradient_counts_once(ranks) -> None:
    """Both ranks square the whole; each part's gradient is that of one square, not of two."""
    for rank, gradient in zip(ranks, ([[2.0], [6.0]], [[4.0], [8.0]])):
        assert rank["assembled"] == [[[2.0, 1.0], [4.0, 3.0]], gradient]


def test_the_split_is_causally_balanced() -> None:
    """Two sequences over two ranks: the outer chunks of each on the first, the inner ones on the second."""
    assert zigzag_rows([8, 4], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_rows([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag_rows([3], 1, 0).tolist() == [0, 1, 2]
    with pytest.raises(AssertionError, match="multiple of 2"):
        zigzag_rows([6], 2, 0)
