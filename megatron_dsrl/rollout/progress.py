"""Who is told of the progress while a batch is sampled."""

from collections.abc import Callable

from megatron_dsrl.rollout.engine_call import EngineCall
from megatron_dsrl.rollout.sample import Group

OnSamples = Callable[[int], None]
"""Told how many samples have come back, each time some do."""
OnGroup = Callable[[int, Group], None]
"""Gets every group, with its position in the batch, as soon as it is judged, in any order."""
OnCall = Callable[[EngineCall], None]
"""Told of every call to an engine when it has ended."""


def ignore(*progress: object) -> None:
    """For callers that do not watch the progress."""
