"""Saved rollouts in place of sampling: train-only runs, and comparisons of layouts on the same samples."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.errors import UserError
from megatron_dsrl.rollout.recording import read_groups, rollout_file
from megatron_dsrl.rollout.sample import Group


def replayed_groups(
    run_folder: Path, step: int, prompts: Sequence[Prompt], samples_per_prompt: int, routing_replay: bool
) -> list[Group]:
    """The saved groups of a step, which must be those that would be sampled now.

    Args:
        run_folder: where they were saved.
        step: counted from 1.
        prompts: of the step.
        samples_per_prompt: of each.
        routing_replay: the experts that tokens were sent to are needed too; otherwise they are left out.

    Raises:
        UserError: The file is missing, holds other prompts or another number of samples, or lacks the experts.
    """
    file = rollout_file(run_folder, step)
    try:
        groups = read_groups(file)
    except UserError as error:
        raise UserError(f"rollout.replay_from: {error}") from error
    if len(groups) != len(prompts):
        raise UserError(
            f"rollout.replay_from: {file} holds {len(groups)} prompts, this run takes {len(prompts)} per step; set "
            f"rollout.prompts_per_step={len(groups)}"
        )
    for group, prompt in zip(groups, prompts, strict=True):
        if len(group.samples) != samples_per_prompt:
            raise UserError(
                f"rollout.replay_from: {file} holds {len(group.samples)} samples of prompt {group.prompt.index}, this "
                f"run takes {samples_per_prompt}; set rollout.samples_per_prompt={len(group.samples)}"
            )
        if group.prompt.token_ids != prompt.token_ids:
            raise UserError(
                f"rollout.replay_from: {file} holds prompt {group.prompt.index} where this run takes prompt "
                f"{prompt.index}; use the same data, seed and chat template"
            )
    if not routing_replay:
        return [_without_experts(group) for group in groups]
    if any(sample.routed_experts is None for group in groups for sample in group.samples):
        raise UserError(
            f"rollout.replay_from: {file} does not say which experts tokens were sent to; record it with "
            "rollout.routing_replay=true, or set that to false here"
        )
    return groups


def _without_experts(group: Group) -> Group:
    return replace(group, samples=tuple(replace(sample, routed_experts=None) for sample in group.samples))
