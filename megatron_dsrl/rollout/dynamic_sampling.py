"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): sample until enough groups can teach something.

A group whose rewards are all equal has no advantage under a group baseline. Rounds of prompts are sampled until the
batch has as many mixed groups as it should; the surplus of the last round, and every group that is not mixed, is left
out of the update. (DAPO's own code samples whole batches; here a round asks for what is missing, times a factor.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dsrl.config.rollout import DynamicSamplingConfig
from megatron_dsrl.rollout.sample import Group


@dataclass(frozen=True)
class DynamicBatch:
    """What the rounds of a step gave."""

    kept: list[Group]
    """Mixed groups in the order of their prompts, at most as many as were wanted."""
    sampled: list[Group]
    """All groups of all rounds."""
    rounds: int

    def metrics(self, wanted: int) -> dict[str, int]:
        """The `dynamic_sampling/*` part of a step record."""
        mixed = sum(map(is_mixed, self.sampled))
        return {
            "dynamic_sampling/rounds": self.rounds,
            "dynamic_sampling/sampled_groups": len(self.sampled),
            "dynamic_sampling/surplus_groups": mixed - len(self.kept),
            "dynamic_sampling/missing_groups": wanted - len(self.kept),
        }


def is_mixed(group: Group) -> bool:
    """Whether the rewards of a group differ."""
    return len({sample.reward for sample in group.samples}) > 1


def sample_until_mixed(
    sample_round: Callable[[int, int], list[Group]], wanted: int, config: DynamicSamplingConfig
) -> DynamicBatch:
    """Sample rounds until there are enough mixed groups, or the rounds are used up.

    Args:
        sample_round: called with the round's number (from 0) and a number of prompts; returns their groups.
        wanted: mixed groups that the batch should have.
        config: limits.
    """
    sampled: list[Group] = []
    kept: list[Group] = []
    for number in range(config.max_rounds):
        missing = wanted - len(kept)
        sampled += sample_round(number, math.ceil(missing * config.oversampling))
        kept = [group for group in sampled if is_mixed(group)][:wanted]
        if len(kept) == wanted:
            break
    return DynamicBatch(kept, sampled, number + 1)
