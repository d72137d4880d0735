"""Weights of sequences against the loss that each aggregation promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.algorithms.aggregations import AggregationOptions, SequenceMean, TokenMean, TokenSum

LENGTHS = [3, 1, 4]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (TokenMean(), [1 / 8] * 3),
        (SequenceMean(), [1 / 9, 1 / 3, 1 / 12]),
        (TokenSum(), [1 / 30] * 3),  # 3 samples x rollout.max_response_tokens
        (TokenSum(constant=5), [1 / 15] * 3),
    ],
)
def test_by_hand(aggregation, expected) -> None:
    weights = aggregation.weights(LENGTHS, max_response_tokens=10)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected)
    assert aggregation.weights([], max_response_tokens=10).tolist() == []


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=10), seed=st.integers(0, 9))
def test_the_weighted_sum_is_the_promised_mean(lengths, seed) -> None:
    losses = [torch.randn(n, generator=torch.Generator().manual_seed(seed + n)) for n in lengths]

    def total(aggregation: AggregationOptions) -> float:
        weights = aggregation.weights(lengths, max_response_tokens=64)
        return sum(weight * loss.sum() for weight, loss in zip(weights, losses)).item()

    assert total(TokenMean()) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-6)
    assert total(SequenceMean()) == pytest.approx(torch.stack([x.mean() for x in losses]).mean().item(), abs=1e-6)
    assert total(TokenSum()) == pytest.approx(torch.stack([x.sum() for x in losses]).mean().item() / 64, abs=1e-6)


@given(length=st.integers(1, 64), count=st.integers(1, 16))
def test_for_equal_lengths_all_agree_up_to_the_constant(length, count) -> None:
    token, sequence, summed = (a.weights([length] * count, 64) for a in (TokenMean(), SequenceMean(), TokenSum()))
    torch.testing.assert_close(token, sequence)
    torch.testing.assert_close(summed * 64 / length, token)
