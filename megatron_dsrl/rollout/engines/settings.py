"""The part of a configuration that engines need, which training runs and evaluations have in common."""

from typing import Protocol

from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.rollout import EngineConfig, RolloutConfig


class PromptSettings(Protocol):
    """What engines and verifiers need to know about the prompts."""

    @property
    def max_prompt_tokens(self) -> int:
        """Length of the longest prompt, in tokens."""

    @property
    def set_rewards(self) -> dict[str, RewardConfig]:
        """Verifiers of the prompt sets that have their own, by set; see `DataConfig.set_rewards`."""


class RolloutSettings(Protocol):
    """The sections of `RunConfig` and `BenchmarkRunConfig` that determine engines and samples."""

    @property
    def seed(self) -> int:
        """Seed of all samples; see `rollout/seeds.py`."""

    @property
    def model(self) -> ModelConfig:
        """The model that engines load."""

    @property
    def data(self) -> PromptSettings:
        """Limits of the prompts."""

    @property
    def parallel(self) -> ParallelConfig:
        """The trainer's layout, which shares its GPUs with the engines."""

    @property
    def rollout(self) -> RolloutConfig:
        """How samples are drawn."""

    @property
    def engine(self) -> EngineConfig:
        """How engines are started and watched."""

    @property
    def reward(self) -> RewardConfig:
        """The verifier of the samples."""
