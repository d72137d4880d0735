"""Which sampled responses the report shows: a few groups of the first, the middle and the last recorded step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.recording import read_groups, rollout_file
from megatron_dsrl.rollout.sample import Outcome, Sample, SampleGroup

GROUPS_PER_STEP = 3
SAMPLES_PER_GROUP = 8
MAX_CHARACTERS = 12_000
"""Limit for a prompt and for a response; the middle of longer ones is left out."""


@dataclass(frozen=True)
class ShownGroup:
    """One prompt and the first of its responses."""

    kind: Outcome
    prompt: Prompt
    samples: Sequence[Sample]
    hidden_samples: int
    """Number of the group's other samples, which are only in the rollout file."""
    mean_reward: float
    """Mean reward of all samples of the group."""


def shown_steps(run_folder: Path, steps: Sequence[int]) -> dict[int, list[ShownGroup]]:
    """Groups of the first, middle and last of `steps` whose rollouts were saved; empty when none were."""
    saved = [step for step in steps if rollout_file(run_folder, step).is_file()]
    chosen = sorted({saved[0], saved[len(saved) // 2], saved[-1]}) if saved else []
    return {step: choose_groups(read_groups(rollout_file(run_folder, step)), GROUPS_PER_STEP) for step in chosen}


def choose_groups(groups: Sequence[SampleGroup], count: int) -> list[ShownGroup]:
    """The first mixed, the first unsolved and the first solved group, then others in order, `count` in all."""
    kinds = [group.outcome for group in groups]
    first_of_kind = [kinds.index(kind) for kind in ("mixed", "unsolved", "solved") if kind in kinds]
    chosen = [*first_of_kind, *(place for place in range(len(groups)) if place not in first_of_kind)]
    return [_shown(groups[place], kinds[place]) for place in chosen[:count]]


def _shown(group: SampleGroup, kind: Outcome) -> ShownGroup:
    samples = group.samples[:SAMPLES_PER_GROUP]
    mean_reward = fmean(sample.reward for sample in group.samples)
    return ShownGroup(kind, group.prompt, samples, len(group.samples) - len(samples), mean_reward)
