"""Gradient alignment: the model, its layout, and how responses are scored."""

from typing import Literal

from pydantic import Field

from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.section import Section


class GradientAnalysisConfig(Section):
    """Settings of `dsrl analyse gradients`; those of a run are taken from its own configuration."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits; for a run, the temperature of its rollouts."""

    bos: Literal["im_start", "none", "assistant"] = "im_start"
    """What replaces the prompt in pre-train space; see `algorithms.spaces.PreTrain`."""
