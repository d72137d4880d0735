"""Saved rollouts in place of sampling: train-only runs, and comparisons of layouts on the same samples."""

from collections.abc import Sequence
from pathlib import Path

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.errors import UserError
from megatron_dsrl.rollout.recording import read_groups, rollout_file
from megatron_dsrl.rollout.sample import Group


def replayed_groups(run_folder: Path, step: int, prompts: Sequence[Prompt], samples_per_prompt: int) -> list[Group]:
    """The saved groups of a step, which must be those that would be sampled now.

    Raises:
        UserError: The file is missing, or holds other prompts or another number of samples.
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
    return groups
