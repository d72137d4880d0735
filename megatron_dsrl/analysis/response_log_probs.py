"""Token log-probs of one response in both spaces."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ResponseLogProbs:
    """Of one response; nat."""

    with_prompt: list[float]
    """One per token."""
    without_prompt: list[float | None]
    """One per token; None for a first one that nothing stands before (`bos: none`)."""
