"""Response lengths and the two entropies of a step, by hand."""

from megatron_dsrl.analysis.lengths import lengths_of_step, summary
from megatron_dsrl.rollout.sample import SampleGroup
from tests.observability.synthetic_run import make_group, make_sample


def group_of(*samples) -> SampleGroup:
    return SampleGroup(make_group([]).prompt, samples)


def test_a_step() -> None:
    right = make_sample(1.0, tokens=2, log_probs=(-1.0, -3.0))
    wrong = make_sample(0.0, tokens=4, log_probs=(-0.5,) * 4, finish_reason="length")

    record = lengths_of_step(3, [group_of(right, wrong)], {3: {"step": 3, "policy/entropy": 0.7}})

    assert record == {
        "step": 3,
        "responses": 2,
        "mean_tokens": 3.0,
        "mean_tokens_of_right": 2.0,
        "mean_tokens_of_others": 4.0,
        "truncated_fraction": 0.5,
        "sampled_entropy": 1.0,  # (1 + 3 + 4 * 0.5) / 6 tokens
        "trained_entropy": 0.7,
    }


def test_what_is_missing_is_none() -> None:
    record = lengths_of_step(1, [group_of(make_sample(1.0, tokens=0, log_probs=()))], {})

    assert record["mean_tokens_of_others"] is record["sampled_entropy"] is record["trained_entropy"] is None
    assert summary([record])["mean_tokens_last"] == 0.0

    nothing = lengths_of_step(2, [], {})
    assert (nothing["responses"], nothing["mean_tokens"], nothing["truncated_fraction"]) == (0, None, None)
