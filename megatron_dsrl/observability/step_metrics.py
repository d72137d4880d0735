"""What a rollout batch says about the policy: the `reward/*`, `response/*` and `throughput/*` keys of a step record.

Pure functions of the sampled groups. A sample is *right* when its reward is at least 1 and *wrong* when it is at most
0, so that verifiers with partial credit fit: a group of half-right samples is neither solved nor unsolved but mixed.
"""

from collections.abc import Sequence

from megatron_dsrl.rollout.sample import Group, Sample


def rollout_metrics(
    groups: Sequence[Group], generated_tokens: int, generate_seconds: float
) -> dict[str, int | float]:
    """All metrics of this module for one step's groups, which must not be empty.

    `generated_tokens` were produced for the step, in `generate_seconds` of wall time, verification included where it
    overlaps. Both may be 0: all groups were there already.
    """
    samples = [sample for group in groups for sample in group.samples]
    assert samples, "a step without samples"
    return (
        reward_metrics(groups)
        | verifier_metrics(samples)
        | response_metrics(samples)
        | throughput_metrics(generated_tokens, generate_seconds)
    )


def reward_metrics(groups: Sequence[Group]) -> dict[str, int | float]:
    """Mean reward over all samples, and how many groups are solved (all right), unsolved (all wrong) or mixed."""
    rewards = [[sample.reward for sample in group.samples] for group in groups]
    solved = sum(all(reward >= 1 for reward in group) for group in rewards)
    unsolved = sum(all(reward <= 0 for reward in group) for group in rewards)
    return {
        "reward/mean": _mean([reward for group in rewards for reward in group]),
        "reward/solved_groups": solved,
        "reward/unsolved_groups": unsolved,
        "reward/mixed_groups": len(groups) - solved - unsolved,
    }


def verifier_metrics(samples: Sequence[Sample]) -> dict[str, int]:
    """Samples whose verifier ran out of time or failed; they score 0 without having been judged."""
    return {
        "reward/verifier_timeouts": sum(sample.verdict == "timeout" for sample in samples),
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


def throughput_metrics(tokens: int, seconds: float) -> dict[str, int | float]:
    """Response tokens generated for the step, and per second of generation."""
    return {"throughput/generated_tokens": tokens, "throughput/tokens_per_second": tokens / seconds if tokens else 0.0}


def count_tokens(groups: Sequence[Group]) -> int:
    """Response tokens of all samples."""
    return sum(len(sample.response_ids) for group in groups for sample in group.samples)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
