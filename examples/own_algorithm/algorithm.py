"""A custom advantage, loss and filter.

Each is a class: its fields are the options in the configuration, its one method computes. `run.yaml` names them by
their dotted paths.
"""

import torch
from pydantic import Field
from torch import Tensor

from megatron_dsrl.algorithms.advantages import AdvantageEstimate, AdvantageOptions, group_mean_advantage
from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.filters import FilterOptions
from megatron_dsrl.algorithms.losses import LossOptions, ScoredTokens, TokenLosses, probability_ratio


class HarderProblems(AdvantageOptions):
    """A = (r - p) (1 + weight (1 - p)) with the group's mean reward p: problems that are rarely solved count more."""

    compares_samples = True

    weight: float = Field(default=1.0, ge=0)
    """How much more an unsolved problem counts than a solved one."""

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        rewards = experience.sample_rewards
        centred = group_mean_advantage(rewards, experience.groups)
        mean = rewards - centred
        return AdvantageEstimate.from_samples(centred * (1 + self.weight * (1 - mean)), experience)


class SimplePolicyOptimization(LossOptions):
    """l = -(rho A - |A| (rho - 1)^2 / (2 eps)): a parabola instead of the clip (arXiv 2401.16025).

    Its slope is that of the policy gradient at rho = 1 and turns round at rho = 1 + eps for A > 0, 1 - eps for A < 0.
    """

    vanishes_without_advantage = True

    eps: float = Field(default=0.2, gt=0)
    """How far the ratio may move before it is clipped."""

    def token_losses(self, tokens: ScoredTokens) -> TokenLosses:
        ratio = probability_ratio(tokens.log_probs - tokens.old_log_probs)
        advantages = tokens.advantages
        penalty = advantages.abs() * (ratio - 1).square() / (2 * self.eps)
        return TokenLosses(penalty - ratio * advantages, {"beyond_eps_fraction": (ratio - 1).abs() > self.eps})


class NotTooLong(FilterOptions):
    """Keep samples with at most `max_tokens` scored tokens."""

    max_tokens: int = Field(ge=1)
    """The longest that is kept."""

    def keep(self, experience: Experience) -> Tensor:
        return torch.tensor(experience.num_scored) <= self.max_tokens
