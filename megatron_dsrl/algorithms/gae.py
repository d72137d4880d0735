"""Generalized advantage estimation (arXiv 1506.02438) over the tokens of responses.

With token rewards r_t and critic values V_t, where V_t is the value of the text *before* token t:

    delta_t = r_t + gamma V_{t+1} - V_t        (the TD residual; V after the last token is 0)
    A_t     = delta_t + gamma lambda A_{t+1}   (the sum of (gamma lambda)^l delta_{t+l} over l, as a recursion)
    R_t     = A_t + V_t                        (the TD(lambda) return, regression target of the critic)

A response truncated at the length limit ends like any other: nothing after it can earn a reward. The recursion runs in
float64 over all sequences at once, one token position at a time.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_dsrl.algorithms.advantages import AdvantageEstimate, AdvantageOptions, whiten
from megatron_dsrl.algorithms.experience import Experience, ModelPasses
from megatron_dsrl.config.choices import ADVANTAGES


@ADVANTAGES.register
class GeneralizedAdvantage(AdvantageOptions):
    """Generalized advantage estimation (arXiv 1506.02438), as in PPO, from a critic's values (configured in the
    `critic` section)."""

    name: Literal["gae"] = "gae"
    needs: ClassVar[ModelPasses] = ModelPasses(values=True)

    discount: float = Field(default=1.0, ge=0, le=1)
    """gamma: discount per token."""

    trace_decay: float = Field(default=1.0, ge=0, le=1)
    """lambda: 1 relies on observed rewards (more variance), 0 on the critic's next value (more bias)."""

    whiten: bool = True
    """Standardise advantages over all tokens of the rollout batch. Returns are not standardised."""

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        assert experience.values is not None, "run the critic's pass first: see required_passes"
        advantages, returns = generalized_advantages(
            experience.token_rewards, experience.values, self.discount, self.trace_decay
        )
        return AdvantageEstimate(whiten(advantages) if self.whiten else advantages, returns)


def generalized_advantages(
    rewards: Sequence[Tensor], values: Sequence[Tensor], discount: float, trace_decay: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Advantages and returns for each token.

    Args:
        rewards: per sequence [num_scored], the reward at each token; any float dtype.
        values: per sequence [num_scored], the value before each token.

    Returns:
        advantages and returns, each per sequence [num_scored] in the dtype of its values.
    """
    lengths = [len(value) for value in values]
    assert lengths == [len(reward) for reward in rewards], "one reward and one value per scored token"
    if not lengths:
        return (), ()
    # Right-aligned: all sequences end in the last column, so the recursion needs no per-sequence start.
    reward, value = _pad_left(rewards), _pad_left(values)
    advantages = torch.zeros_like(value)
    following_value = following_advantage = value.new_zeros(len(lengths))
    for t in reversed(range(value.shape[1])):
        error = reward[:, t] + discount * following_value - value[:, t]
        following_advantage = error + discount * trace_decay * following_advantage
        advantages[:, t], following_value = following_advantage, value[:, t]
    rows = [(a[a.shape[0] - n :], v) for a, v, n in zip(advantages, values, lengths)]
    return (
        tuple(a.to(v.dtype) for a, v in rows),
        tuple((a + v.double()).to(v.dtype) for a, v in rows),
    )


def _pad_left(sequences: Sequence[Tensor]) -> Tensor:
    """[num_sequences, longest] float64, zero-padded on the left."""
    return pad_sequence([sequence.double() for sequence in sequences], batch_first=True, padding_side="left")
