"""The choices in a configuration, and where the built-in ones are defined."""

from typing import TYPE_CHECKING, Annotated

from megatron_dsrl.config.registry import Options, Registry

SAMPLERS = Registry("prompt sampler", ["megatron_dsrl.data.samplers"])
SPACES = Registry("space", ["megatron_dsrl.algorithms.spaces"])
ADVANTAGES = Registry("advantage", ["megatron_dsrl.algorithms.advantages", "megatron_dsrl.algorithms.gae"])
FILTERS = Registry("filter", ["megatron_dsrl.algorithms.filters"])
LOSSES = Registry("loss", ["megatron_dsrl.algorithms.losses"])
AGGREGATIONS = Registry("aggregation", ["megatron_dsrl.algorithms.aggregations"])
IMPORTANCE_CORRECTIONS = Registry("importance correction", ["megatron_dsrl.algorithms.importance"])
TRACKERS = Registry(
    "tracker",
    [f"megatron_dsrl.observability.trackers.{name}" for name in ("wandb", "mlflow", "swanlab", "trackio")],
)

if TYPE_CHECKING:
    from megatron_dsrl.observability.trackers.base import TrackerOptions as AnyTracker
else:
    AnyTracker = Annotated[Options, TRACKERS]
    """`wandb`, `mlflow`, `swanlab`, `trackio`, or your own class by its dotted path; its options go beside the name."""
