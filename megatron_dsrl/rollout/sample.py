"""Input and output of the rollout side: sampling parameters, a sample, and the group of samples of one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Literal

from megatron_dsrl.common.compact import float_array, int_array
from megatron_dsrl.config.benchmark import BenchmarkConfig
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.run import EvaluationSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rewards.score import Verdict

TurnRewards = tuple[tuple[int, float], ...]
"""(number of response tokens until then, reward) of each reward that `rollout.generate` recorded, in order."""

Outcome = Literal["solved", "unsolved", "mixed"]


@dataclass(frozen=True)
class Sample:
    """One response, as sampled. Token ids are the engine's; text is never tokenised again."""

    response_ids: Sequence[int]
    """Response tokens, including the end-of-turn token if the engine emitted it. Stored as a compact array, like the
    log-probs."""
    log_probs: Sequence[float]
    """Engine log-prob of every response token given the full prompt, at the sampling temperature; float32. 0 for tokens
    that are not the policy's. Unit: nats."""
    text: str
    """Decoded response without special tokens."""
    finish_reason: Literal["stop", "length"]
    """`length` marks a truncated response."""
    weight_version: int
    """Version of the policy weights that produced the response, or its last part."""
    reward: float
    """The verifier's score, plus the sum of `turn_rewards`."""
    verdict: Verdict = "ok"
    """Whether the verifier succeeded; `timeout` and `error` score 0. All but `ok` are counted."""
    older_versions: tuple[tuple[int, int], ...] = ()
    """(weight version, number of tokens) of the beginning that earlier weights produced, oldest first; only for a
    response carried over from an earlier step."""
    routed_experts: str | None = None
    """Experts that every token of prompt and response except the last was sent to, in every layer; see
    `model.routed_experts`. None unless requested."""
    scored: tuple[bool, ...] | None = None
    """Which response tokens the policy generated and are scored; None means all."""
    turn_rewards: TurnRewards = ()
    """Rewards that `rollout.generate` recorded."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "response_ids", int_array(self.response_ids))
        object.__setattr__(self, "log_probs", float_array(self.log_probs))

    @property
    def policy_log_probs(self) -> Sequence[float]:
        """Log-probs of the tokens that the policy generated. Unit: nats."""
        return self.log_probs if self.scored is None else float_array(compress(self.log_probs, self.scored))

    @property
    def oldest_version(self) -> int:
        """Version of the weights that produced its first token."""
        return self.older_versions[0][0] if self.older_versions else self.weight_version

    def tokens_before(self, weight_version: int) -> int:
        """Number of tokens, all at the beginning, that were produced by weights older than this version."""
        if self.weight_version < weight_version:
            return len(self.response_ids)
        return sum(count for _, count in self.older_versions)


@dataclass(frozen=True)
class SampleGroup:
    """All samples of one prompt in one step."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    @property
    def oldest_version(self) -> int:
        """Oldest version of the weights that produced any of its tokens."""
        return min(sample.oldest_version for sample in self.samples)

    @property
    def outcome(self) -> Outcome:
        """Solved if all samples are right (reward at least 1), unsolved if all are wrong (at most 0), otherwise mixed,
        as half-right ones are."""
        rewards = [sample.reward for sample in self.samples]
        return "solved" if min(rewards) >= 1 else "unsolved" if max(rewards) <= 0 else "mixed"

    @property
    def rewards_differ(self) -> bool:
        """Whether its samples have different rewards, which dynamic sampling asks for."""
        return len({sample.reward for sample in self.samples}) > 1


def count_tokens(groups: Sequence[SampleGroup]) -> int:
    """Response tokens of all samples that the policy generated."""
    return sum(len(sample.policy_log_probs) for group in groups for sample in group.samples)


@dataclass(frozen=True)
class SamplingParameters:
    """Sampling parameters of one request, the only difference between sampling for training and for evaluation."""

    max_response_tokens: int
    """Length limit; a response that reaches it is marked `length`."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end a response; the one that did is kept as its last token."""
    temperature: float = 1.0
    """0 is greedy decoding. Log-probs are `log_softmax(logits / temperature)`."""
    top_p: float = 1.0
    """Nucleus sampling; 1 is off. Log-probs are not renormalised."""
    top_k: int = -1
    """Top-k sampling; -1 is off."""
    return_routed_experts: bool = False
    """Whether to return the experts that every token was sent to."""

    @classmethod
    def for_training(cls, config: RolloutConfig, stop_token_ids: tuple[int, ...]) -> "SamplingParameters":
        """The sampling parameters of the `rollout` section."""
        return cls(
            max_response_tokens=config.max_response_tokens,
            stop_token_ids=stop_token_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            return_routed_experts=config.routing_replay,
        )

    @classmethod
    def for_evaluation(
        cls, config: EvaluationSetConfig | BenchmarkConfig, max_response_tokens: int, stop_token_ids: tuple[int, ...]
    ) -> "SamplingParameters":
        """The sampling parameters of a held-out set or a benchmark, with the length limit that applies to it."""
        return cls(max_response_tokens, stop_token_ids, config.temperature, config.top_p, config.top_k)
