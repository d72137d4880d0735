"""Rollout metrics against groups worked out by hand."""

import pytest

from megatron_dsrl.rollout.sample import SampleGroup
from megatron_dsrl.run.rollout_metrics import rollout_metrics
from tests.observability.synthetic_run import make_group, make_sample


def test_four_groups_worked_by_hand() -> None:
    solved = make_group([1.0, 1.0], tokens=4)
    unsolved = make_group([0.0, 0.0], tokens=10, finish_reason="length")
    mixed = SampleGroup(
        prompt=solved.prompt,
        samples=(make_sample(1.0, tokens=2), make_sample(0.0, tokens=3, verdict="timeout")),
    )
    partial_credit = SampleGroup(
        prompt=solved.prompt,
        samples=(make_sample(0.5, tokens=1), make_sample(0.5, tokens=6, verdict="error")),
    )

    metrics = rollout_metrics([solved, unsolved, mixed, partial_credit], generated_tokens=40, generate_seconds=8.0)

    assert metrics == {
        "reward/mean": pytest.approx(4 / 8),  # 2 + 0 + 1 + 1 over eight samples
        "reward/solved_groups": 1,
        "reward/unsolved_groups": 1,
        "reward/mixed_groups": 2,  # half-right samples are neither right nor wrong
        "reward/verifier_timeouts": 1,
        "reward/verifier_fallbacks": 0,
        "reward/verifier_errors": 1,
        "response/mean_tokens": pytest.approx(40 / 8),  # 2 x 4 + 2 x 10 + 2 + 3 + 1 + 6
        "response/max_tokens": 10,
        "response/truncated_fraction": pytest.approx(2 / 8),
        "response/conditional_entropy": pytest.approx(0.5),
        "throughput/generated_tokens": 40,
        "throughput/tokens_per_second": pytest.approx(5.0),
    }


def test_conditional_entropy_is_a_mean_over_tokens_of_all_samples() -> None:
    right = make_sample(1.0, tokens=1, log_probs=(-3.0,))
    wrong = make_sample(0.0, tokens=3, log_probs=(-1.0, -0.5, -0.5))
    group = SampleGroup(make_group([]).prompt, (right, wrong))
    metrics = rollout_metrics([group], generated_tokens=4, generate_seconds=1.0)
    assert metrics["response/conditional_entropy"] == pytest.approx((3 + 1 + 0.5 + 0.5) / 4)
