"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): sample until enough groups can teach something.

A group whose rewards are all equal has no advantage under a group baseline: it is left out of the update, and further
prompts are sampled until the batch has as many mixed groups as it should. They replace it one by one, as soon as it is
judged, and what is still on its way when there are enough is aborted (`enough_groups.EnoughFeed`).

Which groups are the first is then decided by time. Deterministic sampling therefore goes by whole rounds, as below:
each asks for what is missing, times a factor, and its surplus is left out. (DAPO's own code samples whole batches.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dsrl.config.rollout import DynamicSamplingConfig
from megatron_dsrl.rollout.sample import Group


@dataclass(frozen=True)
class DynamicBatch:
    """What the rounds of a step gave."""

    kept: list[Group]
    """Mixed groups in the order of their prompts, at most as many as were wanted."""
    others: list[Group]
    """All other groups of all rounds."""
    rounds: int


def is_mixed(group: Group) -> bool:
    """Whether the rewards of a group differ."""
    return len({sample.reward for sample in group.samples}) > 1


def dynamic_sampling_metrics(kept: Sequence[Group], others: Sequence[Group], wanted: int) -> dict[str, int]:
    """The `dynamic_sampling/*` part of a step record that does not depend on how prompts were replaced.

    Args:
        kept: the groups that are trained on.
        others: those that were sampled to their end besides.
        wanted: groups that the batch should have.
    """
    return {
        "dynamic_sampling/sampled_groups": len(kept) + len(others),
        "dynamic_sampling/surplus_groups": sum(map(is_mixed, others)),
        "dynamic_sampling/missing_groups": wanted - len(kept),
    }


def sample_until_mixed(
    sample_round: Callable[[int, int], list[Group]], wanted: int, config: DynamicSamplingConfig
) -> DynamicBatch:
    """Sample rounds until there are enough mixed groups, or the rounds are used up.

    Args:
        sample_round: called with the round's number (from 0) and a number of prompts; returns their groups.
        wanted: mixed groups that the batch should have.
        config: limits.
    """
    kept: list[Group] = []
    others: list[Group] = []
    for number in range(config.max_rounds):
        missing = wanted - len(kept)
        for group in sample_round(number, math.ceil(missing * config.oversampling)):
            (kept if is_mixed(group) and len(kept) < wanted else others).append(group)
        if len(kept) == wanted:
            break
    return DynamicBatch(kept, others, number + 1)
