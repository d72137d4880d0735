"""Metrics of a rollout batch: the `reward/*`, `response/*` and `throughput/*` keys of a step record.

Pure functions of the sampled groups.
"""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from megatron_dsrl.rollout.sample import Outcome, Sample, SampleGroup


def rollout_metrics(
    groups: Sequence[SampleGroup], generated_tokens: int, generate_seconds: float
) -> dict[str, int | float]:
    """All metrics of this module for one step's groups, which must not be empty.

    `generated_tokens` were produced for the step, in `generate_seconds` of wall time, verification included where it
    overlaps. Both are 0 if all groups were already there.
    """
    samples = [sample for group in groups for sample in group.samples]
    assert samples, "a step without samples"
    return (
        reward_metrics(groups)
        | set_metrics(groups)
        | verifier_metrics(samples)
        | response_metrics(samples)
        | entropy_metrics(samples)
        | generation_metrics(samples)
        | {
            "throughput/generated_tokens": generated_tokens,
            "throughput/tokens_per_second": generated_tokens / generate_seconds if generated_tokens else 0.0,
        }
    )


def reward_metrics(groups: Sequence[SampleGroup]) -> dict[str, int | float]:
    """Mean reward over all samples, and how many groups are solved, unsolved or mixed; see `SampleGroup.outcome`."""
    outcomes = [group.outcome for group in groups]
    return {
        "reward/mean": _mean([sample.reward for group in groups for sample in group.samples]),
        **{f"reward/{outcome}_groups": outcomes.count(outcome) for outcome in get_args(Outcome)},
    }


def set_metrics(groups: Sequence[SampleGroup]) -> dict[str, int | float]:
    """Groups, mean reward, mixed groups and mean response length of each set of a mixture, as `sets/<name>/...`."""
    metrics: dict[str, int | float] = {}
    for name in sorted({group.prompt.prompt_set for group in groups} - {""}):
        members = [group for group in groups if group.prompt.prompt_set == name]
        rewards = reward_metrics(members)
        metrics |= {
            f"sets/{name}/groups": len(members),
            f"sets/{name}/reward": rewards["reward/mean"],
            f"sets/{name}/mixed_groups": rewards["reward/mixed_groups"],
            f"sets/{name}/mean_tokens": _mean([len(one.response_ids) for group in members for one in group.samples]),
        }
    return metrics


def verifier_metrics(samples: Sequence[Sample]) -> dict[str, int]:
    """Samples whose verifier ran out of time or failed, which score 0, and those that its fallback judged."""
    return {
        "reward/verifier_timeouts": sum(sample.verdict == "timeout" for sample in samples),
        "reward/verifier_fallbacks": sum(sample.verdict == "fallback" for sample in samples),
        "reward/verifier_errors": sum(sample.verdict == "error" for sample in samples),
    }


def response_metrics(samples: Sequence[Sample]) -> dict[str, int | float]:
    """Response lengths in tokens, and the fraction of samples cut at the length limit."""
    lengths = [len(sample.response_ids) for sample in samples]
    return {
        "response/mean_tokens": _mean(lengths),
        "response/max_tokens": max(lengths),
        "response/truncated_fraction": _mean([sample.finish_reason == "length" for sample in samples]),
    }


def generation_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """With `rollout.generate`: mean number of tokens per response that are not the model's, if a response has any; and
    mean per response of the rewards that the function recorded, if it recorded any."""
    inserted = [len(sample.response_ids) - len(sample.policy_log_probs) for sample in samples]
    rewards = [sum(value for _, value in sample.turn_rewards) for sample in samples]
    recorded = any(sample.turn_rewards for sample in samples)
    return ({"response/inserted_tokens": _mean(inserted)} if any(inserted) else {}) | (
        {"reward/recorded_mean": _mean(rewards)} if recorded else {}
    )


def entropy_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Entropy per token of the policy that sampled, given the prompt, in nats: `response/conditional_entropy`.

    The mean of -log P(token | prompt, tokens before) over all tokens that the policy sampled, with the engine's
    log-probs at the sampling temperature. Each term's expectation is the entropy of the distribution that the token was
    drawn from, so this estimates the same quantity in every phase; with top-p or top-k it is the cross-entropy from the
    truncated distribution to the full one. Its standard error is around 1 nat over the square root of the number of
    tokens: 0.001 for a million. The exact entropy would need another forward pass wherever a phase scores log P(y).
    """
    tokens = sum(len(sample.policy_log_probs) for sample in samples)
    total = sum(float(np.asarray(sample.policy_log_probs).sum(dtype=np.float64)) for sample in samples)
    return {"response/conditional_entropy": -total / tokens} if tokens else {}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
