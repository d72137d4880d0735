"""What the rollout side hands to the rest: a sample, and the group of samples of one prompt."""

from dataclasses import dataclass
from typing import Literal

from megatron_dsrl.data.prompt import Prompt


@dataclass(frozen=True)
class Sample:
    """One response, as sampled. Token ids are the engine's own; nothing is ever tokenised again."""

    response_ids: tuple[int, ...]
    """Response tokens, the end-of-turn token included where the engine emitted it."""

    log_probs: tuple[float, ...]
    """Engine log-prob of every response token at the sampling temperature, full prompt in context. Unit: nat."""

    text: str
    """Decoded response without special tokens."""

    finish_reason: Literal["stop", "length"]
    """`length` marks a truncated response."""

    weight_version: int
    """Version of the policy weights that produced the response."""

    reward: float
    """The verifier's score."""

    verdict: Literal["ok", "timeout", "error"] = "ok"
    """Whether the verifier itself succeeded; `timeout` and `error` score 0 and are counted."""


@dataclass(frozen=True)
class Group:
    """All samples of one prompt in one step."""

    prompt: Prompt
    samples: tuple[Sample, ...]
