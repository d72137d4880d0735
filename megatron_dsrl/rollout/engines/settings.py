"""The part of a configuration that engines need, which training runs and evaluations have in common."""

from megatron_dsrl.config.benchmark import BenchmarkRunConfig
from megatron_dsrl.config.run import RunConfig

RolloutSettings = RunConfig | BenchmarkRunConfig
"""Their common sections determine engines and samples: `model`, `data`, `parallel`, `rollout`, `engine`, `reward`."""
