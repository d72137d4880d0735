"""What the timeline records of a call to an engine."""

from dataclasses import dataclass


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
