"""One call to an engine, after it has ended: what the timeline shows of rollout."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineCall:
    """What an engine was asked for, when, and what came of it."""

    engine: int
    """Its number."""
    prompts: tuple[int, ...]
    """Rows of the prompts in their set."""
    tokens: int
    """That came back."""
    attempt: int
    """From 1."""
    outcome: str
    """`done`, `aborted`, `cancelled`, or what went wrong."""
    started: float
    """On the monotonic clock, in seconds."""
    ended: float
