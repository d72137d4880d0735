"""Benchmarks, and how `dsrl eval` runs them."""

from pydantic import Field, field_validator

from megatron_dsrl.config.data import PromptSetConfig, RewardConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.rollout import EngineConfig, RolloutConfig
from megatron_dsrl.config.section import Section

WEEK_SECONDS = 7 * 24 * 3600


def repeated_greedy_samples(temperature: float, samples_per_prompt: int) -> str | None:
    """What is wrong with several samples of a prompt at temperature 0; None for other settings."""
    if temperature > 0 or samples_per_prompt == 1:
        return None
    return (
        f"temperature 0 is greedy decoding, so {samples_per_prompt} samples of a prompt would all be the same; set a "
        "temperature above 0, or samples_per_prompt to 1"
    )


class BenchmarkConfig(PromptSetConfig):
    """A benchmark: its problems, how they are asked, judged and sampled."""

    title: str
    """Shown in tables and plots."""

    reward: RewardConfig
    """The verifier."""

    samples_per_prompt: int = Field(default=32, ge=1)
    """Responses per problem: k of Avg@k."""

    max_response_tokens: int = Field(default=8192, ge=1)
    """Length limit of a response."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy decoding."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off."""

    top_k: int = Field(default=-1, ge=-1)
    """Top-k sampling; -1 is off."""


class PromptLimits(Section):
    """What the engines need to know about the prompts."""

    max_prompt_tokens: int
    """Longest prompt."""

    @property
    def set_rewards(self) -> dict[str, RewardConfig]:
        """A benchmark is not a mixture."""
        return {}


class BenchmarkRunConfig(Section):
    """The engines of `dsrl eval`: the sections of a training run that have a meaning there."""

    seed: int = Field(default=1, ge=0)
    """Seed of sampling."""

    model: ModelConfig
    data: PromptLimits = PromptLimits(max_prompt_tokens=1024)
    parallel: ParallelConfig = ParallelConfig(collective_timeout_seconds=2 * WEEK_SECONDS)
    rollout: RolloutConfig = RolloutConfig(step_timeout_seconds=float(WEEK_SECONDS))
    """Here `step_timeout_seconds` limits a whole benchmark; the benchmark sets the sampling parameters."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)

    @field_validator("engine")
    @classmethod
    def _starts_from_the_weights_on_disk(cls, engine: EngineConfig) -> EngineConfig:
        if engine.quantization is not None:
            raise ValueError("quantization is for training, whose weight push quantises; leave it out")
        return engine
