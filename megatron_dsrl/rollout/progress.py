"""Callbacks that report progress while a batch is sampled."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_dsrl.observability.timeline import EngineCall
from megatron_dsrl.rollout.sample import SampleGroup

OnSamples = Callable[[int], None]
"""Called with the number of samples that have just come back."""
OnGroup = Callable[[int, SampleGroup], None]
"""Called with every group and its position in the batch as soon as it is judged, in any order."""
OnCall = Callable[[EngineCall], None]
"""Called with every finished call to an engine."""


def ignore(*progress: object) -> None:
    """A callback that does nothing."""


@dataclass(frozen=True)
class BatchProgress:
    """Who is told what happens while a batch is sampled."""

    on_samples: OnSamples = ignore
    on_group: OnGroup = ignore
    on_call: OnCall = ignore
