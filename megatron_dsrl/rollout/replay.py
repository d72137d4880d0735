"""Saved rollouts in place of sampling: train-only runs, comparisons of layouts on the same samples, bisection of a run.

What a step was trained on is replayed, in its order, whatever way it was sampled: tokens, log-probs, weight versions,
rewards. So dynamic sampling and partial rollouts have no effect, and no prompt is chosen.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.errors import UserError
from megatron_dsrl.rollout.recording import read_batch, rollout_file
from megatron_dsrl.rollout.sample import Group


def replayed_groups(
    run_folder: Path, step: int, prompts: Sequence[Prompt], config: RolloutConfig
) -> tuple[list[Group], list[Group]]:
    """The saved batch of a step, which must fit this run, and what was sampled besides.

    Args:
        run_folder: where it was saved.
        step: counted from 1.
        prompts: all that this run may train on.
        config: of this run.

    Raises:
        UserError: The file is missing, has more groups than this run takes, or prompts that are not this run's, or
            another number of samples, or lacks the experts that `routing_replay` needs.
    """
    file = rollout_file(run_folder, step)
    try:
        groups, others = read_batch(file)
    except UserError as error:
        raise UserError(f"rollout.replay_from: {error}") from error
    _check_size(file, groups, others, config)
    of_index = {prompt.index: prompt for prompt in prompts}
    for group in groups:
        own = of_index.get(group.prompt.index)
        if own is None or own.token_ids != group.prompt.token_ids:
            raise UserError(
                f"rollout.replay_from: {file} holds prompt {group.prompt.index}, which this run "
                f"{'does not have' if own is None else 'has in another form'}; use the same data and chat template"
            )
    if not config.routing_replay:
        return [_without_experts(group) for group in groups], [_without_experts(group) for group in others]
    if any(sample.routed_experts is None for group in groups for sample in group.samples):
        raise UserError(
            f"rollout.replay_from: {file} does not say which experts tokens were sent to; record it with "
            "rollout.routing_replay=true, or set that to false here"
        )
    return groups, others


def _check_size(file: Path, groups: Sequence[Group], others: Sequence[Group], config: RolloutConfig) -> None:
    """Fewer groups than the step should have are what dynamic sampling has found."""
    if len(groups) > config.prompts_per_step or (len(groups) < config.prompts_per_step and not others):
        raise UserError(
            f"rollout.replay_from: {file} holds {len(groups)} prompts that were trained on, this run takes "
            f"{config.prompts_per_step} per step; set rollout.prompts_per_step to that of the recorded run"
        )
    for group in groups:
        if len(group.samples) != config.samples_per_prompt:
            raise UserError(
                f"rollout.replay_from: {file} holds {len(group.samples)} samples of prompt {group.prompt.index}, this "
                f"run takes {config.samples_per_prompt}; set rollout.samples_per_prompt={len(group.samples)}"
            )


def _without_experts(group: Group) -> Group:
    return replace(group, samples=tuple(replace(sample, routed_experts=None) for sample in group.samples))
