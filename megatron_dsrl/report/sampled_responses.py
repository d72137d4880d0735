"""Which sampled responses the report shows: a few groups of the first, the middle and the last recorded step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_dsrl.common.visible_text import shortened
from megatron_dsrl.rollout.recording import read_groups, rollout_file
from megatron_dsrl.rollout.sample import Sample, SampleGroup
from megatron_dsrl.run.rollout_metrics import reward_metrics

GROUPS_PER_STEP = 3
SAMPLES_PER_GROUP = 8
MAX_CHARACTERS = 12_000


@dataclass(frozen=True)
class ShownSample:
    """One response as the page shows it."""

    text: str
    reward: float
    tokens: int
    finish_reason: str
    verdict: str
    mean_log_prob: float | None
    """Engine log-prob per token; nat. None for an empty response."""


@dataclass(frozen=True)
class ShownGroup:
    """One prompt and its responses as the page shows them."""

    kind: str
    """`solved`, `mixed` or `unsolved`."""
    prompt: str
    answer: str
    prompt_tokens: int
    weight_version: int
    mean_reward: float
    samples: list[ShownSample]
    hidden_samples: int
    """Further samples of the group that are only in the rollout file."""


@dataclass(frozen=True)
class ShownStep:
    """Some groups of one step."""

    step: int
    groups: list[ShownGroup]


def shown_steps(run_folder: Path, steps: Sequence[int]) -> list[ShownStep]:
    """Groups of the first, middle and last of `steps` whose rollouts were saved; empty when none were."""
    saved = [step for step in steps if rollout_file(run_folder, step).is_file()]
    if not saved:
        return []
    chosen = sorted({saved[0], saved[len(saved) // 2], saved[-1]})
    return [ShownStep(step, _shown_groups(rollout_file(run_folder, step))) for step in chosen]


def choose_groups(groups: Sequence[SampleGroup], count: int) -> list[SampleGroup]:
    """The first mixed, the first unsolved and the first solved group, then further ones in order, `count` in all."""
    first_of_kind = {group_kind(group): group for group in reversed(groups)}
    chosen = [first_of_kind[kind] for kind in ("mixed", "unsolved", "solved") if kind in first_of_kind]
    chosen += [group for group in groups if all(group is not other for other in chosen)]
    return chosen[:count]


def group_kind(group: SampleGroup) -> str:
    """`solved`, `mixed` or `unsolved`, as the step metrics count them."""
    metrics = reward_metrics([group])
    return next(kind for kind in ("solved", "mixed", "unsolved") if metrics[f"reward/{kind}_groups"])


def _shown_groups(file: Path) -> list[ShownGroup]:
    return [_shown_group(group) for group in choose_groups(read_groups(file), GROUPS_PER_STEP)]


def _shown_group(group: SampleGroup) -> ShownGroup:
    return ShownGroup(
        kind=group_kind(group),
        prompt=shortened(group.prompt.text, MAX_CHARACTERS),
        answer=group.prompt.answer,
        prompt_tokens=len(group.prompt.token_ids),
        weight_version=group.samples[0].weight_version,
        mean_reward=sum(sample.reward for sample in group.samples) / len(group.samples),
        samples=[_shown_sample(sample) for sample in group.samples[:SAMPLES_PER_GROUP]],
        hidden_samples=max(0, len(group.samples) - SAMPLES_PER_GROUP),
    )


def _shown_sample(sample: Sample) -> ShownSample:
    tokens, log_probs = len(sample.response_ids), sample.policy_log_probs
    return ShownSample(
        text=shortened(sample.text, MAX_CHARACTERS),
        reward=sample.reward,
        tokens=tokens,
        finish_reason=sample.finish_reason,
        verdict=sample.verdict,
        mean_log_prob=fmean(log_probs) if log_probs else None,
    )
