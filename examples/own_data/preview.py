"""Look before you train: the first prompts of a configuration as the model sees them, and what some answers are worth.

python -m examples.own_data.preview examples/own_data/run.yaml [key.path=value ...]
"""

import sys
from collections.abc import Sequence

from megatron_dsrl.commands.arguments import files_and_overrides
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.rewards.registry import check_options, reward_function
from megatron_dsrl.run.inputs import load_inputs

RESPONSES = (r"\boxed{15}", r"so it is \boxed{14}", "15", r"\boxed{}")
"""To the first prompt of problems.jsonl, whose answer is 15."""


def preview(config: RunConfig, count: int = 2) -> list[str]:
    """Lines for people: the first prompts with their gold answers, and the rewards of RESPONSES to the first one.

    Raises:
        UserError: as `load_inputs` and `check_options`.
    """
    prompts = load_inputs(config).prompts
    check_options(config.reward.function, config.reward.options)
    reward = reward_function(config.reward.function)
    lines = [f"{len(prompts)} prompts, the longest has {max(len(prompt.token_ids) for prompt in prompts)} tokens"]
    for prompt in prompts[:count]:
        lines += [f"--- prompt {prompt.index}: {len(prompt.token_ids)} tokens, answer {prompt.answer!r}", prompt.text]
    for response in RESPONSES:
        lines.append(f"reward of {response}: {reward(response, prompts[0].answer, **config.reward.options):g}")
    return lines


def main(arguments: Sequence[str]) -> None:
    print(*preview(load_config(*files_and_overrides(arguments))), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
