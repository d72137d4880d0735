"""Advantages of a sample relative to the other samples of its prompt.

All functions take the rewards of the whole rollout batch and the group of each, so that groups of unequal size
(failed samples) need no reshaping.
"""

import torch
from torch import Tensor

from megatron_dsrl.config.phase import GroupMeanAdvantageConfig, GroupStandardisedAdvantageConfig


def group_mean_advantage(rewards: Tensor, groups: Tensor) -> Tensor:
    """A = r - mean of the group: with a 0/1 reward and success rate p, a wrong sample weighs -p.

    Args:
        rewards: [num_samples] float.
        groups: [num_samples] int64, the group of each sample, numbered from 0.

    Returns:
        [num_samples], dtype of `rewards`. Exactly 0 in groups whose rewards are all equal.
    """
    return rewards - _group_means(rewards, groups)[groups]


def group_standardised_advantage(rewards: Tensor, groups: Tensor, eps: float = 1e-6) -> Tensor:
    """A = (r - mean) / (std + eps) with the unbiased standard deviation of the group (GRPO, arXiv 2402.03300).

    A group of one sample has no deviation and gets A = 0.

    Args:
        rewards: [num_samples] float.
        groups: [num_samples] int64, the group of each sample, numbered from 0.
        eps: added to the standard deviation.

    Returns:
        [num_samples], dtype of `rewards`.
    """
    centred = group_mean_advantage(rewards, groups)
    sizes = torch.bincount(groups).to(rewards.dtype)
    squares = torch.zeros_like(sizes).index_add_(0, groups, centred.square())
    deviations = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return centred / (deviations[groups] + eps)


def _group_means(rewards: Tensor, groups: Tensor) -> Tensor:
    """[num_groups] mean reward; exact for groups of equal rewards, whose A must be 0 and not a rounding error."""
    sizes = torch.bincount(groups).to(rewards.dtype)
    first = torch.zeros_like(sizes)
    first[groups.flip(0)] = rewards.flip(0)
    return first + torch.zeros_like(sizes).index_add_(0, groups, rewards - first[groups]) / sizes


def compute_advantages(
    rewards: Tensor, groups: Tensor, config: GroupMeanAdvantageConfig | GroupStandardisedAdvantageConfig
) -> Tensor:
    """Advantages of a rollout batch as the phase's configuration says; shapes as above."""
    match config:
        case GroupMeanAdvantageConfig():
            return group_mean_advantage(rewards, groups)
        case GroupStandardisedAdvantageConfig():
            return group_standardised_advantage(rewards, groups, config.eps)
