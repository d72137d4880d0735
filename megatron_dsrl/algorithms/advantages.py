"""Advantages: turn rewards into a weight for every token.

For a custom advantage, subclass `AdvantageOptions` and name it by its dotted path; examples/own_algorithm shows how.
Baselines take the rewards of the whole rollout batch and the group of each sample, so that groups of unequal size
(failed samples) need no reshaping. The advantage that needs a critic is in `gae.py`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience, ModelPasses, PerToken
from megatron_dsrl.config.choices import ADVANTAGES
from megatron_dsrl.config.registry import Options


@dataclass(frozen=True)
class AdvantageEstimate:
    """How much better each scored token was than expected."""

    advantages: PerToken
    returns: PerToken | None = None
    """Regression target of the critic for each token; None if no critic is trained."""

    @classmethod
    def from_samples(cls, advantages: Tensor, experience: Experience) -> "AdvantageEstimate":
        """The same advantage for all tokens of a sample, from [num_sequences] float32."""
        return cls(expand_to_tokens(advantages, experience.num_scored))


class AdvantageOptions(Options):
    """Base class of advantages: fields are options, `estimate` computes."""

    needs: ClassVar[ModelPasses] = ModelPasses()
    """Model passes whose results `estimate` reads."""

    compares_samples: ClassVar[bool] = False
    """Whether it needs several samples per prompt."""

    ignores_penalties: ClassVar[bool] = False
    """Whether a KL penalty in the reward would have no effect on it."""

    @abstractmethod
    def estimate(self, experience: Experience) -> AdvantageEstimate:
        """Advantages of a whole rollout batch with complete groups, before any filter.

        Read rewards from `experience.sample_rewards` or `experience.token_rewards`, which include the KL penalty.
        """


def expand_to_tokens(values: Tensor, num_scored: Sequence[int]) -> PerToken:
    """Repeat each of [num_sequences] values for the scored tokens of its sequence."""
    return tuple(value.expand(count) for value, count in zip(values, num_scored))


@ADVANTAGES.register
class RawReward(AdvantageOptions):
    """A = r: REINFORCE (Williams, 1992) without a baseline."""

    name: Literal["raw_reward"] = "raw_reward"

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        return AdvantageEstimate.from_samples(experience.sample_rewards, experience)


@ADVANTAGES.register
class Fixed(AdvantageOptions):
    """One weight for every right sample and one for every wrong sample, including all-right and all-wrong groups (NSR,
    PSR and W-REINFORCE of arXiv 2506.01347). For W-REINFORCE set `positive: 0.1`."""

    name: Literal["fixed"] = "fixed"
    ignores_penalties: ClassVar[bool] = True

    positive: float = 1.0
    """Advantage of a right sample: lambda of W-REINFORCE."""

    negative: float = -1.0
    """Advantage of a wrong sample: its reward is at most 0.5."""

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        right = experience.rewards > 0.5
        return AdvantageEstimate.from_samples(torch.where(right, self.positive, self.negative), experience)


@ADVANTAGES.register
class GroupMean(AdvantageOptions):
    """A = r - mean of the group: GRPO without the division (Dr.GRPO, arXiv 2503.20783), and the warm-up of DSRL
    (arXiv 2604.14142)."""

    name: Literal["group_mean"] = "group_mean"
    compares_samples: ClassVar[bool] = True

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        advantages = group_mean_advantage(experience.sample_rewards, experience.groups)
        return AdvantageEstimate.from_samples(advantages, experience)


@ADVANTAGES.register
class GroupStandardised(AdvantageOptions):
    """A = (r - mean) / (std + eps), with the unbiased standard deviation of the group (GRPO, arXiv 2402.03300)."""

    name: Literal["group_standardised"] = "group_standardised"
    compares_samples: ClassVar[bool] = True

    eps: float = Field(default=1e-6, gt=0)
    """Added to the standard deviation."""

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        advantages = group_standardised_advantage(experience.sample_rewards, experience.groups, self.eps)
        return AdvantageEstimate.from_samples(advantages, experience)


@ADVANTAGES.register
class LeaveOneOut(AdvantageOptions):
    """A = r - mean of the other samples of the group (RLOO, arXiv 2402.14740)."""

    name: Literal["leave_one_out"] = "leave_one_out"
    compares_samples: ClassVar[bool] = True

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        advantages = leave_one_out_advantage(experience.sample_rewards, experience.groups)
        return AdvantageEstimate.from_samples(advantages, experience)


@ADVANTAGES.register
class ReinforcePlusPlus(AdvantageOptions):
    """REINFORCE++ (arXiv 2501.03262): the undiscounted reward-to-go at each token, standardised over all tokens of the
    batch. Usually combined with a KL penalty in the reward (`kl.reward_coefficient`)."""

    name: Literal["reinforce_pp"] = "reinforce_pp"

    eps: float = Field(default=1e-8, gt=0)
    """Added to the variance."""

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        return AdvantageEstimate(whiten(rewards_to_go(experience.token_rewards), self.eps))


@ADVANTAGES.register
class ReinforcePlusPlusBaseline(AdvantageOptions):
    """REINFORCE++ with a baseline (arXiv 2501.03262): subtract the group mean from the reward, then proceed as
    REINFORCE++.

    Standardising over the batch also subtracts the mean over all tokens, so samples of a uniform group get a small
    advantage rather than exactly 0.
    """

    name: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"
    compares_samples: ClassVar[bool] = True

    eps: float = Field(default=1e-8, gt=0)
    """Added to the variance."""

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        centred = group_mean_advantage(experience.sample_rewards, experience.groups)
        return AdvantageEstimate(whiten(expand_to_tokens(centred, experience.num_scored), self.eps))


@ADVANTAGES.register
class Distillation(AdvantageOptions):
    """A = log p_teacher - log p_student at each token: the negative of the sampled reverse KL divergence, as in
    on-policy distillation (arXiv 2306.13649). The teacher is the reference policy: `reference.path` or `reference.url`.
    Rewards have no effect."""

    name: Literal["distillation"] = "distillation"
    needs: ClassVar[ModelPasses] = ModelPasses(old_log_probs=True, reference_log_probs=True)
    ignores_penalties: ClassVar[bool] = True

    clip: float | None = Field(default=None, gt=0)
    """Limit of |A|, in nats; null: none."""

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        teacher, student = experience.reference_log_probs, experience.old_log_probs
        assert teacher is not None and student is not None, "see needs"
        gaps = tuple(theirs - ours for theirs, ours in zip(teacher, student, strict=True))
        if self.clip is not None:
            gaps = tuple(gap.clamp(-self.clip, self.clip) for gap in gaps)
        return AdvantageEstimate(gaps)


def group_mean_advantage(rewards: Tensor, groups: Tensor) -> Tensor:
    """A = r - mean of the group: with a 0/1 reward and success rate p, a wrong sample gets -p.

    Args:
        rewards: [num_samples] float.
        groups: [num_samples] int64, the group of each sample, numbered from 0.

    Returns:
        [num_samples], dtype of `rewards`. Exactly 0 in groups whose rewards are all equal.
    """
    return rewards - _group_means(rewards, groups)[groups]


def group_standardised_advantage(rewards: Tensor, groups: Tensor, eps: float = 1e-6) -> Tensor:
    """A = (r - mean) / (std + eps) with the unbiased standard deviation of the group (GRPO, arXiv 2402.03300).

    A group of one sample gets A = 0. Arguments and result are as in `group_mean_advantage`.
    """
    centred = group_mean_advantage(rewards, groups)
    sizes = torch.bincount(groups).to(rewards.dtype)
    squares = torch.zeros_like(sizes).index_add_(0, groups, centred.square())
    deviations = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return centred / (deviations[groups] + eps)


def leave_one_out_advantage(rewards: Tensor, groups: Tensor) -> Tensor:
    """A = r - mean of the *other* samples of the group (RLOO, arXiv 2402.14740): G / (G - 1) times `group_mean`.

    A group of one sample has nothing to compare with, so it gets A = 0. Arguments and result are as in
    `group_mean_advantage`.
    """
    sizes = torch.bincount(groups).to(rewards.dtype)
    return group_mean_advantage(rewards, groups) * (sizes / (sizes - 1).clamp(min=1))[groups]


def rewards_to_go(token_rewards: PerToken) -> PerToken:
    """Sum of the rewards from each token to the end of its sequence, without discount."""
    return tuple(rewards.flip(0).cumsum(0).flip(0) for rewards in token_rewards)


def _group_means(rewards: Tensor, groups: Tensor) -> Tensor:
    """[num_groups] mean reward; exact for groups of equal rewards, so that A is 0 there and not a rounding error."""
    sizes = torch.bincount(groups).to(rewards.dtype)
    lowest = torch.zeros_like(sizes).scatter_reduce(0, groups, rewards, "amin", include_self=False)
    return lowest + torch.zeros_like(sizes).index_add_(0, groups, rewards - lowest[groups]) / sizes


def whiten(values: Sequence[Tensor], eps: float = 1e-8) -> tuple[Tensor, ...]:
    """(x - mean) / sqrt(var + eps) over the tokens of the whole batch, with the unbiased variance. Values are
    [num_scored] float per sequence.

    PPO implementations for language models such as TRL and verl do the same; the original PPO standardises each
    mini-batch instead. A batch of one token has no variance and becomes 0.
    """
    tokens = torch.cat([torch.zeros(0, dtype=torch.float64), *(value.double() for value in values)])
    if len(tokens) == 0:
        return tuple(values)
    mean = tokens.mean()
    variance = tokens.var() if len(tokens) > 1 else torch.zeros((), dtype=torch.float64)
    return tuple(((value.double() - mean) * (variance + eps).rsqrt()).to(value.dtype) for value in values)
