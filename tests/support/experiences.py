"""Small experiences and scored tokens whose numbers are chosen by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.losses import ScoredTokens
from megatron_dsrl.algorithms.spaces import ScoredSequence


def experience_of(
    rewards: Sequence[float], groups: Sequence[int], lengths: Sequence[int], penalties: Sequence[Tensor] | None = None
) -> Experience:
    """An experience in the post-train space with this many scored tokens per sequence, after a prompt of one token."""
    return Experience(
        sequences=tuple(ScoredSequence(tuple(range(length + 1)), 1) for length in lengths),
        rewards=torch.tensor(rewards),
        groups=torch.tensor(groups),
        engine_log_probs=tuple(torch.zeros(length) for length in lengths),
        prompt_in_context=True,
        truncated=torch.zeros(len(rewards), dtype=torch.bool),
        penalties=None if penalties is None else tuple(penalties),
    )


def scored_tokens(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    num_scored: Sequence[int] | None = None,
    engine_log_probs: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> ScoredTokens:
    """Tokens of one sequence, or of several."""
    return ScoredTokens(
        log_probs=log_probs,
        entropy=torch.zeros_like(advantages) if entropy is None else entropy,
        old_log_probs=old_log_probs,
        engine_log_probs=old_log_probs if engine_log_probs is None else engine_log_probs,
        reference_log_probs=reference_log_probs,
        advantages=advantages,
        num_scored=tuple(num_scored or (len(advantages),)),
    )
