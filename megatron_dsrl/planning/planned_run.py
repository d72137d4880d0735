"""What a plan is made for: a run, the GPUs that it gets, and what has to be assumed."""

from dataclasses import dataclass, replace
from typing import Any

from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.gpus import Gpu


@dataclass(frozen=True)
class Assumptions:
    """Quantities that cannot be computed from the configuration."""

    mean_response_tokens: int
    training_utilisation: float = 0.35
    """Share of the GPU's peak that forward and backward reach."""
    bandwidth_utilisation: float = 0.6
    """Share of the memory bandwidth that decoding reaches."""


@dataclass(frozen=True)
class PlannedRun:
    """A run on a number of GPUs."""

    config: RunConfig
    architecture: Architecture
    gpu: Gpu
    world_size: int
    assumptions: Assumptions

    @property
    def has_work(self) -> bool:
        """Whether every data-parallel replica has a sample in every optimizer step."""
        samples = self.config.rollout.samples_per_step // self.config.actor.mini_batches_per_rollout
        return samples >= self.world_size // self.config.parallel.model_parallel_size

    def with_fields(self, section: str, **fields: Any) -> "PlannedRun":
        """The same with other values of a section of the configuration."""
        return replace(self, config=self.config.with_fields(section, **fields))
