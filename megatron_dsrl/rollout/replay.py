"""Recorded samples instead of sampling: train-only runs, comparing layouts on the same samples, bisecting a run.

A step replays exactly what the recorded run trained on, in its order and however it was sampled: tokens, log-probs,
weight versions, rewards. Dynamic sampling and partial rollouts have no effect, and no prompts are drawn.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.recording import read_batch, rollout_file
from megatron_dsrl.rollout.sample import SampleGroup, SamplingParameters, count_tokens
from megatron_dsrl.rollout.step_samples import Draw, StepSamples, Watch
from megatron_dsrl.rollout.without_engines import WithoutEngines


class ReplayRollout(WithoutEngines):
    """The rollout side of a run that trains on the recorded samples of another run: no engines, no verifier."""

    def __init__(self, config: RolloutConfig, prompts: Sequence[Prompt], stop_token_ids: tuple[int, ...]) -> None:
        """
        Args:
            config: this run's; `replay_from` is the recorded run's folder.
            prompts: all prompts that this run may train on.
            stop_token_ids: tokens that end a response.

        Raises:
            UserError: the folder has no recorded rollouts.
        """
        assert config.replay_from is not None
        super().__init__(SamplingParameters.for_training(config, stop_token_ids), "rollout.replay_from")
        self._run_folder = Path(config.replay_from)
        self._config = config
        self._prompts = prompts
        if not (self._run_folder / "rollouts").is_dir():
            raise UserError(f"rollout.replay_from: {self._run_folder} has no folder `rollouts`")

    def sample_step(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The samples that the recorded run trained on in this step.

        Raises:
            UserError: the recording does not fit this run; see `replayed_groups`.
        """
        started = time.perf_counter()
        draw(self._config.prompts_per_step)  # so that a run continued without the recording draws the next batch
        groups, others = replayed_groups(self._run_folder, step, self._prompts, self._config)
        seconds = time.perf_counter() - started
        return StepSamples(groups, others, generated_tokens=count_tokens(groups + others), seconds=seconds)


def replayed_groups(
    run_folder: Path, step: int, prompts: Sequence[Prompt], config: RolloutConfig
) -> tuple[list[SampleGroup], list[SampleGroup]]:
    """The recorded batch of a step, which must fit this run, and the groups that were not trained on.

    Args:
        run_folder: the recorded run's.
        step: counted from 1.
        prompts: all prompts that this run may train on.
        config: this run's.

    Raises:
        UserError: the file is missing; has more groups, other prompts or another number of samples than this run; or
            lacks the experts that `routing_replay` needs.
    """
    file = rollout_file(run_folder, step)
    try:
        groups, others = read_batch(file)
    except UserError as error:
        raise UserError(f"rollout.replay_from: {error}") from error
    _check_size(file, groups, others, config)
    prompt_at = {prompt.index: prompt for prompt in prompts}
    for group in groups:
        own = prompt_at.get(group.prompt.index)
        if own is None or own.token_ids != group.prompt.token_ids:
            raise UserError(
                f"rollout.replay_from: {file} holds prompt {group.prompt.index}, which this run "
                f"{'does not have' if own is None else 'has in another form'}; use the same data and chat template"
            )
    if not config.routing_replay:
        return [_without_experts(group) for group in groups], [_without_experts(group) for group in others]
    if any(sample.routed_experts is None for group in groups for sample in group.samples):
        raise UserError(
            f"rollout.replay_from: {file} does not record which experts tokens were sent to; record it with "
            "rollout.routing_replay=true, or set that to false here"
        )
    return groups, others


def _check_size(
    file: Path, groups: Sequence[SampleGroup], others: Sequence[SampleGroup], config: RolloutConfig
) -> None:
    """Check the numbers of groups and samples. Dynamic sampling may have found fewer groups than a step takes."""
    if len(groups) > config.prompts_per_step or (len(groups) < config.prompts_per_step and not others):
        raise UserError(
            f"rollout.replay_from: {file} holds {len(groups)} prompts that were trained on, but this run takes "
            f"{config.prompts_per_step} per step; set rollout.prompts_per_step to the recorded run's value"
        )
    for group in groups:
        if len(group.samples) != config.samples_per_prompt:
            raise UserError(
                f"rollout.replay_from: {file} holds {len(group.samples)} samples of prompt {group.prompt.index}, but "
                f"this run takes {config.samples_per_prompt}; set rollout.samples_per_prompt={len(group.samples)}"
            )


def _without_experts(group: SampleGroup) -> SampleGroup:
    return replace(group, samples=tuple(replace(sample, routed_experts=None) for sample in group.samples))
