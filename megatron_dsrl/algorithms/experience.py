"""From judged responses to what the actor trains on: rewards -> advantages -> sample filter -> space."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dsrl.algorithms.advantages import compute_advantages
from megatron_dsrl.algorithms.filters import keep_samples
from megatron_dsrl.algorithms.spaces import ScoredSequence, in_post_train_space, in_pre_train_space
from megatron_dsrl.config.phase import PhaseConfig, PreTrainSpaceConfig


@dataclass(frozen=True)
class Response:
    """A judged response and the prompt that it was sampled from, reduced to what an algorithm needs."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    engine_log_probs: Sequence[float]
    """[len(response_ids)] log-probs that the engine sampled with, full prompt in context."""
    reward: float
    group: int
    """Number of the prompt within the rollout batch, from 0."""


@dataclass(frozen=True)
class Experience:
    """The sequences of one or more optimizer steps, all data-parallel ranks together. Same on every rank."""

    sequences: tuple[ScoredSequence, ...]
    advantages: Tensor
    """[num_sequences] float32."""
    engine_log_probs: tuple[Tensor, ...]
    """Per sequence [num_scored] float32, aligned with the scored tokens."""
    old_log_probs: tuple[Tensor, ...] | None = None
    """Per sequence [num_scored] float32 under the policy before the update, on the same scored sequence. None where
    the update is strictly on-policy: the old log-prob is then the current one without gradient, and the ratio is 1."""

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, indices: Sequence[int]) -> "Experience":
        """The named sequences, in that order."""
        return replace(
            self,
            sequences=tuple(self.sequences[i] for i in indices),
            advantages=self.advantages[list(indices)],
            engine_log_probs=tuple(self.engine_log_probs[i] for i in indices),
            old_log_probs=None if self.old_log_probs is None else tuple(self.old_log_probs[i] for i in indices),
        )

    def mini_batches(self, count: int) -> list["Experience"]:
        """Split into `count` consecutive parts whose sizes differ by at most one sequence."""
        bounds = [len(self) * i // count for i in range(count + 1)]
        return [self.select(range(a, b)) for a, b in zip(bounds, bounds[1:])]


def build_experience(responses: Sequence[Response], phase: PhaseConfig, bos_ids: Sequence[int]) -> Experience:
    """Advantages over all responses, then only the kept ones as scored sequences of the phase's space.

    A sample that the filter drops has a zero token mask, so it adds nothing to the loss or to its denominator; it is
    left out here instead of being computed and multiplied by zero. So is a sequence without a token to score.

    Args:
        responses: the whole rollout batch, every group complete.
        phase: advantage, filter and space to apply.
        bos_ids: what stands in for the prompt in the pre-train space; empty for no BOS. Unused in the post-train space.

    Raises:
        ValueError: if rewards are not finite, or a response has not one log-prob per token.
    """
    rewards = torch.tensor([response.reward for response in responses], dtype=torch.float32)
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    groups = torch.tensor([response.group for response in responses], dtype=torch.int64)
    advantages = compute_advantages(rewards, groups, phase.advantage)
    sequences = {
        i: _scored_sequence(responses[i], phase, bos_ids)
        for i in keep_samples(advantages, phase.filter).nonzero().flatten().tolist()
    }
    kept = [i for i, sequence in sequences.items() if sequence.num_scored > 0]
    return Experience(
        sequences=tuple(sequences[i] for i in kept),
        advantages=advantages[kept],
        engine_log_probs=tuple(_scored_log_probs(responses[i], sequences[i]) for i in kept),
    )


def _scored_sequence(response: Response, phase: PhaseConfig, bos_ids: Sequence[int]) -> ScoredSequence:
    if isinstance(phase.space, PreTrainSpaceConfig):
        return in_pre_train_space(bos_ids, response.response_ids)
    return in_post_train_space(response.prompt_ids, response.response_ids)


def _scored_log_probs(response: Response, sequence: ScoredSequence) -> Tensor:
    """The engine's log-probs of the scored tokens: all, or all but the first where there is no BOS."""
    if len(response.engine_log_probs) != len(response.response_ids):
        raise ValueError(
            f"{len(response.response_ids)} response tokens but {len(response.engine_log_probs)} engine log-probs"
        )
    return torch.tensor(response.engine_log_probs[-sequence.num_scored :], dtype=torch.float32)
