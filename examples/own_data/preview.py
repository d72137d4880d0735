"""Look before you train: the first prompts of a configuration as the model sees them, and what some answers are worth.

python -m examples.own_data.preview examples/own_data/run.yaml [key.path=value ...]
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from megatron_dsrl.commands.arguments import files_and_overrides
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.rewards.registry import check_options, reward_function, takes_prompt
from megatron_dsrl.rewards.score import score_of
from megatron_dsrl.run.inputs import load_inputs

RESPONSES = (r"\boxed{15}", r"so it is \boxed{14}", "15", r"\boxed{}")
"""To the first prompt of problems.jsonl, whose answer is 15."""


def preview(config: RunConfig, count: int = 2) -> list[str]:
    """Lines to read: the first prompts with their gold answers, and the rewards of RESPONSES to the first one.

    Raises:
        UserError: like `load_inputs` and `check_options`.
    """
    prompts = load_inputs(config).prompts
    check_options(config.reward.function, config.reward.options)
    lines = [f"{len(prompts)} prompts, the longest has {max(len(prompt.token_ids) for prompt in prompts)} tokens"]
    for prompt in prompts[:count]:
        lines += [f"--- prompt {prompt.index}: {len(prompt.token_ids)} tokens, answer {prompt.answer!r}", prompt.text]
    reward, first = reward_function(config.reward.function), prompts[0]
    options = ({"prompt": first.text} if takes_prompt(reward) else {}) | config.reward.options
    for response in RESPONSES:
        score = score_of(partial(reward, response, first.answer, **options))
        lines.append(f"reward of {response}: {score.problem or format(score.reward, 'g')}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", metavar="CONFIG.yaml [key.path=value]", nargs="+", help="as for dsrl train")
    words = parser.parse_args(arguments).words
    try:
        print(*preview(load_config(*files_and_overrides(words))), sep="\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
