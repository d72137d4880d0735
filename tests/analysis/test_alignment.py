"""From a gradient comparison to records, bins over tokens and a summary, by hand."""

import pytest
import torch

from megatron_dsrl.analysis.alignment import ScoredResponse, charts, gap_by_entropy, gap_by_position, summary
from megatron_dsrl.analysis.gradients import GradientComparison, TokenScores


def response(inner_product: float, without: list[float], given_prompt: list[float]) -> ScoredResponse:
    def scores(log_probs: list[float]) -> TokenScores:
        return TokenScores(torch.tensor(log_probs), 0.1 * torch.arange(float(len(log_probs))))

    comparison = GradientComparison(scores(without), scores(given_prompt), inner_product, 2.0, 5.0)
    return ScoredResponse(step=1, problem=4, number=0, reward=1.0, comparison=comparison)


def test_a_record() -> None:
    record = response(4.0, [-3.0, -1.0], [-1.0, -1.5]).as_record()

    assert record["cosine"] == 0.4
    assert record["gaps"] == [2.0, -0.5]
    assert (record["log_prob"], record["log_prob_given_prompt"]) == (-4.0, -2.5)
    assert (record["mean_gap"], record["mean_absolute_gap"]) == (0.75, 1.25)


def test_without_a_bos_the_first_token_is_left_out() -> None:
    record = response(1.0, [-3.0], [-9.0, -1.0]).as_record()

    assert record["gaps"] == [2.0]
    assert record["entropies"] == [pytest.approx(0.1)]
    assert record["tokens"] == 2
    assert response(1.0, [], [-9.0]).as_record()["mean_gap"] is None


def test_the_summary_counts_responses_and_bins_tokens() -> None:
    records = [response(4.0, [-3.0, -1.0], [-1.0, -1.5]).as_record(), response(-1.0, [-2.0], [-1.75]).as_record()]

    figures = summary(records)

    assert figures["cosine_mean"] == pytest.approx((0.4 - 0.1) / 2)
    assert figures["negative_inner_products"] == 0.5
    assert figures["mean_gap"] == (0.75 + 0.25) / 2  # every response counts alike, however long
    assert [(one["tokens"], one["mean_gap"]) for one in figures["gap_by_position"]] == [(2, 1.125), (1, -0.5)]
    assert len(charts(records)) == 3


def test_positions_double_from_bin_to_bin() -> None:
    bins = gap_by_position([[1.0, 2.0, 4.0, 8.0], [3.0]])

    assert [(one["first_position"], one["last_position"], one["mean_gap"]) for one in bins] == [
        (1, 1, 2.0),
        (2, 3, 3.0),
        (4, 7, 8.0),
    ]


def test_tenths_by_entropy_have_equal_sizes() -> None:
    entropies = [float(i) for i in range(20)][::-1]
    bins = gap_by_entropy([-entropy for entropy in entropies], entropies)

    assert [one["tokens"] for one in bins] == [2] * 10
    assert [one["mean_gap"] for one in bins] == [-(2 * i + 0.5) for i in range(10)]
    assert (bins[3]["lowest_entropy"], bins[3]["highest_entropy"]) == (6.0, 7.0)
