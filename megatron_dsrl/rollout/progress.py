"""Progress while a batch is sampled: the calls to engines, and callbacks that report them."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_dsrl.rollout.sample import SampleGroup


@dataclass(frozen=True)
class EngineCall:
    """A request to an engine, with its time and outcome."""

    engine: int
    """Engine number."""
    prompts: tuple[int, ...]
    """Row numbers of the prompts in their set."""
    tokens: int
    """Response tokens returned."""
    attempt: int
    """Counted from 1."""
    outcome: str
    """`done`, `aborted`, `cancelled`, or the error."""
    started: float
    """On the monotonic clock, in seconds."""
    ended: float


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
