"""How often prompts were answered right in recorded rollouts: for filters and curricula."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.step_names import by_step
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.recording import read_groups, rollout_file

PassRates = Mapping[tuple[int, ...], float]
"""By the token ids of the prompt, so that rows may move and the set may grow."""


def read_pass_rates(run_folder: Path, section: str) -> PassRates:
    """Share of responses with full reward for each prompt of a run's recorded rollouts, over all its steps.

    Args:
        run_folder: folder of the recorded run.
        section: path of the setting, for messages.

    Raises:
        UserError: nothing is recorded there, or a file is damaged.
    """
    files = by_step(rollout_file(run_folder, 1).parent, ".jsonl").values()
    rewards: defaultdict[tuple[int, ...], list[bool]] = defaultdict(list)
    for file in files:
        for group in read_groups(file):
            rewards[group.prompt.token_ids] += [sample.reward >= 1 for sample in group.samples]
    if not rewards:
        raise UserError(
            f"{section}: {run_folder} has no recorded rollouts; record some with `dsrl rollout CONFIG`, or name the "
            "folder of a training run"
        )
    return {prompt: sum(right) / len(right) for prompt, right in rewards.items()}


def with_pass_rates(prompts: Sequence[Prompt], rates: PassRates) -> list[Prompt]:
    """The prompts with their pass rates; None for those that were not sampled."""
    return [replace(prompt, pass_rate=rates.get(prompt.token_ids)) for prompt in prompts]


def within_pass_rates(prompts: Sequence[Prompt], lowest: float, highest: float, section: str) -> list[Prompt]:
    """The prompts whose pass rate is known and between the two, inclusive.

    Raises:
        UserError: none is left.
    """
    left = [prompt for prompt in prompts if prompt.pass_rate is not None and lowest <= prompt.pass_rate <= highest]
    if not left:
        known = sum(prompt.pass_rate is not None for prompt in prompts)
        raise UserError(
            f"{section}: no prompt has a pass rate from {lowest:g} to {highest:g}, and only {known} of {len(prompts)} "
            "have a known one. Widen the range, or record more rollouts"
        )
    return left
