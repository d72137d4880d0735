"""Pass rates of prompts, the share of right responses that an earlier run recorded. Filters and curricula use them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.step_names import by_step
from megatron_dsrl.config.data import TrainingSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.recording import read_groups, rollout_file


def with_pass_rates(prompts: Sequence[Prompt], config: TrainingSetConfig, section: str) -> Sequence[Prompt]:
    """The prompts with their recorded pass rates, None for those that were not sampled; without those that the set's
    filter drops.

    Prompts are recognised by their token ids, so that rows may move and the set may grow.

    Args:
        section: path of the set in the run's configuration, for messages.

    Raises:
        UserError: nothing is recorded, a file is damaged, or the filter leaves no prompt.
    """
    if config.pass_rates_from is None:
        return prompts
    rates = _read_pass_rates(Path(config.pass_rates_from), f"{section}.pass_rates_from")
    prompts = [replace(prompt, pass_rate=rates.get(prompt.token_ids)) for prompt in prompts]
    if not config.filters_by_pass_rate:
        return prompts
    lowest, highest = config.min_pass_rate, config.max_pass_rate
    known = [(prompt, prompt.pass_rate) for prompt in prompts if prompt.pass_rate is not None]
    left = [prompt for prompt, rate in known if lowest <= rate <= highest]
    if not left:
        raise UserError(
            f"{section}.min_pass_rate: no prompt has a pass rate from {lowest:g} to {highest:g}, and only {len(known)} "
            f"of {len(prompts)} have a known one. Widen the range, or record more rollouts"
        )
    return left


def _read_pass_rates(run_folder: Path, section: str) -> dict[tuple[int, ...], float]:
    """By the token ids of the prompt, over all recorded steps."""
    rewards: defaultdict[tuple[int, ...], list[bool]] = defaultdict(list)
    for file in by_step(rollout_file(run_folder, 1).parent, ".jsonl").values():
        for group in read_groups(file):
            rewards[group.prompt.token_ids] += [sample.reward >= 1 for sample in group.samples]
    if not rewards:
        raise UserError(
            f"{section}: {run_folder} has no recorded rollouts; record some with `dsrl rollout CONFIG`, or name the "
            "folder of a training run"
        )
    return {prompt: sum(right) / len(right) for prompt, right in rewards.items()}
