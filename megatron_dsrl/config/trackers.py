"""Which experiment trackers a run reports to. What they do is in `megatron_dsrl/observability/trackers`."""

from typing import TYPE_CHECKING, Annotated

from megatron_dsrl.config.registry import Options, Registry

_PACKAGE = "megatron_dsrl.observability.trackers"

TRACKERS = Registry("tracker", [f"{_PACKAGE}.{name}" for name in ("wandb", "mlflow", "swanlab", "trackio")])

if TYPE_CHECKING:
    from megatron_dsrl.observability.trackers.base import TrackerOptions as AnyTracker
else:
    AnyTracker = Annotated[Options, TRACKERS]
    """`wandb`, `mlflow`, `swanlab`, `trackio`, or your own class by its dotted path; the options stand beside the
    name."""
