"""Token log-probs of one response in both spaces."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ResponseLogProbs:
    """Log-probs of one response's tokens. Unit: nat."""

    with_prompt: list[float]
    """One per token."""
    without_prompt: list[float | None]
    """One per token; None for the first if it has no context (`bos: none`)."""
