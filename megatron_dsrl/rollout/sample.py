"""What the rollout side hands to the rest: a sample, and the group of samples of one prompt."""

from collections.abc import Sequence
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
    """Version of the policy weights that produced the response, or the rest of it."""

    reward: float
    """The verifier's score."""

    verdict: Literal["ok", "timeout", "error"] = "ok"
    """Whether the verifier itself succeeded; `timeout` and `error` score 0 and are counted."""

    older_versions: tuple[tuple[int, int], ...] = ()
    """(weight version, number of tokens) of what earlier weights produced, oldest first; only a response that was
    carried over from an earlier step has such a beginning."""

    routed_experts: str | None = None
    """Experts that every token of prompt and response but the last was sent to, in every layer; see
    `algorithms.routed_experts`. None where they were not asked for."""

    scored: tuple[bool, ...] | None = None
    """Which response tokens are the policy's own, and are scored; None: all of them."""

    @property
    def oldest_version(self) -> int:
        """Of the weights that produced its first token."""
        return self.older_versions[0][0] if self.older_versions else self.weight_version

    def tokens_before(self, weight_version: int) -> int:
        """How many tokens, all at the beginning, older weights than these produced."""
        if self.weight_version < weight_version:
            return len(self.response_ids)
        return sum(count for _, count in self.older_versions)


@dataclass(frozen=True)
class Group:
    """All samples of one prompt in one step."""

    prompt: Prompt
    samples: tuple[Sample, ...]


def count_tokens(groups: Sequence[Group]) -> int:
    """Response tokens of all samples."""
    return sum(len(sample.response_ids) for group in groups for sample in group.samples)
