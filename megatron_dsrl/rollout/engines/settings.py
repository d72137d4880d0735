"""The part of a configuration that engines need, which training runs and evaluations have in common."""

from typing import Protocol

from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.rollout import EngineConfig, RolloutConfig


class PromptSettings(Protocol):
    """What engines and verifiers need to know about the prompts."""

    @property
    def max_prompt_tokens(self) -> int: ...

    @property
    def set_rewards(self) -> dict[str, RewardConfig]: ...


class RolloutSettings(Protocol):
    """The sections of `RunConfig` and `BenchmarkRunConfig` that determine engines and samples."""

    @property
    def seed(self) -> int: ...

    @property
    def model(self) -> ModelConfig: ...

    @property
    def data(self) -> PromptSettings: ...

    @property
    def parallel(self) -> ParallelConfig: ...

    @property
    def rollout(self) -> RolloutConfig: ...

    @property
    def engine(self) -> EngineConfig: ...

    @property
    def reward(self) -> RewardConfig: ...
