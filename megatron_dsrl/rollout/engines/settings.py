"""The part of a configuration that engines need. A training run has it, and so has an evaluation."""

from typing import Protocol

from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.rollout import EngineConfig, RolloutConfig


class PromptSettings(Protocol):
    """What engines must know of the prompts."""

    @property
    def max_prompt_tokens(self) -> int: ...


class RolloutSettings(Protocol):
    """The sections of `RunConfig`, and of `BenchmarkRunConfig`, that decide about engines and samples."""

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
