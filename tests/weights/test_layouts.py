"""How HF tensors map to Megatron shards, on tensors small enough to read."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.weights.layouts import GateAndUp, GroupedQkv, Replicated, Split, TensorLayout, Vocabulary


def rows(*numbers: int) -> torch.Tensor:
    """A column matrix with these rows."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def test_query_key_value_are_interleaved_by_group() -> None:
    """Two groups of two query heads, head dimension 1: each rank holds q, q, k, v of its group."""
    layout = GroupedQkv(groups=2, heads_per_group=2, head_dim=1)
    hf = rows(1, 2, 3, 4), rows(10, 20), rows(100, 200)
    assert layout.shard(hf, rank=0, size=2).flatten().tolist() == [1, 2, 10, 100]
    assert layout.shard(hf, rank=1, size=2).flatten().tolist() == [3, 4, 20, 200]
    assert layout.shard(hf, rank=0, size=1).flatten().tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


def test_every_shard_holds_its_gate_then_its_up() -> None:
    hf = rows(1, 2), rows(10, 20)
    assert GateAndUp().shard(hf, rank=1, size=2).flatten().tolist() == [2, 20]


def test_vocabulary_is_padded_with_zero_rows_even_over_a_whole_rank() -> None:
    hf = (rows(1, 2, 3, 4, 5),)
    shards = [Vocabulary(5).shard(hf, rank, 4).flatten().tolist() for rank in range(4)]
    assert shards == [[1, 2], [3, 4], [5, 0], [0, 0]]


@given(size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000), vocab_size=st.integers(1, 17))
def test_merging_the_shards_gives_the_hf_tensors_back(size: int, seed: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    cases: list[tuple[TensorLayout, tuple[torch.Tensor, ...]]] = [
        (Replicated(), (random(7),)),
        (Split(0), (random(8, 3),)),
        (Split(1), (random(3, 8),)),
        (GateAndUp(), (random(8, 3), random(8, 3))),
        (GroupedQkv(groups=4, heads_per_group=3, head_dim=5), (random(60, 2), random(20, 2), random(20, 2))),
        (Vocabulary(vocab_size), (random(vocab_size, 3),)),
    ]
    for layout, hf in cases:
        merged = layout.merge([layout.shard(hf, rank, size) for rank in range(size)])
        assert len(merged) == len(hf)
        assert all(torch.equal(a, b) for a, b in zip(merged, hf)), layout
