"""Prompts in their order, and settings for the modes of sampling over a scripted engine."""

from dataclasses import replace
from pathlib import Path

from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.rollout.rollout import Draw
from megatron_dsrl.rollout.sample import SampleGroup
from tests.support.engine import numbered_prompts, tiny_run_config

RIGHT, WRONG, MIXED = (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)
"""Rewards of a group."""


def settings(wanted: int, **section: object) -> RunConfig:
    """Two samples for each of `wanted` prompts; `section` has other fields of the rollout section."""
    config = tiny_run_config(Path("model"))
    rollout = RolloutConfig(prompts_per_step=wanted, samples_per_prompt=2, **section)
    return config.model_copy(update={"rollout": rollout})


def draw_in_order() -> Draw:
    """The prompts 0, 1, 2, ... in their order."""
    prompts = iter([replace(prompt, index=index) for index, prompt in enumerate(numbered_prompts(64))])
    return lambda number: [next(prompts) for _ in range(number)]


def rows(groups: list[SampleGroup]) -> list[int]:
    """Numbers of the groups' prompts."""
    return [group.prompt.index for group in groups]
