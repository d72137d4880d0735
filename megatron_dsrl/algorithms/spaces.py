"""The two spaces: how a sampled response becomes a scored sequence.

Post-train space (standard RL) scores log P(y|x): the sequence is prompt + response. Pre-train space (PreRL,
arXiv 2604.14142) scores log P(y): the sequence is BOS + response, without any token of the prompt, and positions
restart at 0 because a scored sequence always starts at position 0. The samples are the same; only what is updated
differs. Everything after this file (packing, log-probs, loss) is one code for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ScoredSequence:
    """Token ids of which the last ones are scored, each given all the tokens before it."""

    token_ids: tuple[int, ...]
    num_context: int
    """Leading tokens that are only context; at least 1, since a token is scored given those before it."""

    @property
    def num_scored(self) -> int:
        """Scored tokens: the sequence without its context."""
        return len(self.token_ids) - self.num_context


def in_post_train_space(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> ScoredSequence:
    """Prompt + response, every response token scored.

    Raises:
        ValueError: if the prompt or the response is empty.
    """
    if not prompt_ids or not response_ids:
        raise ValueError("a scored sequence needs at least one prompt token and one response token")
    return ScoredSequence((*prompt_ids, *response_ids), len(prompt_ids))


def in_pre_train_space(bos_ids: Sequence[int], response_ids: Sequence[int]) -> ScoredSequence:
    """BOS + response, every response token scored; the prompt does not enter.

    With empty `bos_ids` (no BOS) the first response token has no context to be predicted from: it becomes the
    context and is not scored. A response of that one token then has nothing to score (`num_scored` is 0).

    Raises:
        ValueError: if the response is empty.
    """
    if not response_ids:
        raise ValueError("a scored sequence needs at least one response token")
    return ScoredSequence((*bos_ids, *response_ids), max(len(bos_ids), 1))
