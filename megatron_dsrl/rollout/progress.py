"""Callbacks that report progress while a batch is sampled."""

from collections.abc import Callable

from megatron_dsrl.rollout.engine_call import EngineCall
from megatron_dsrl.rollout.sample import Group

OnSamples = Callable[[int], None]
"""Called with the number of samples that have just come back."""
OnGroup = Callable[[int, Group], None]
"""Called with every group and its position in the batch as soon as it is judged, in any order."""
OnCall = Callable[[EngineCall], None]
"""Called with every finished call to an engine."""


def ignore(*progress: object) -> None:
    """A callback that does nothing."""
