"""Generalized advantage estimation: an example worked by hand, and the paper's sum without its recursion."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_dsrl.algorithms.advantages import whiten
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.gae import generalized_advantages
from megatron_dsrl.algorithms.objective import with_advantages
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.config.phase import KLConfig, ObjectiveConfig

numbers = st.floats(-4, 4, width=32)
sequences = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), min_size=1, max_size=5)
factors = st.floats(0, 1, width=32)


def definition(rewards: Tensor, values: Tensor, discount: float, trace_decay: float) -> Tensor:
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, every term written out."""
    length = len(rewards)
    following = torch.cat([values[1:], values.new_zeros(1)])
    errors = rewards + discount * following - values
    return torch.stack(
        [sum((discount * trace_decay) ** (k - t) * errors[k] for k in range(t, length)) for t in range(length)]
    )


def test_an_example_by_hand() -> None:
    """Two responses of three and one tokens, rewarded at their ends; gamma 0.5, lambda 0.5."""
    rewards = [torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0])]
    values = [torch.tensor([0.5, 1.0, 0.5]), torch.tensor([2.0])]
    advantages, returns = generalized_advantages(rewards, values, discount=0.5, trace_decay=0.5)
    # delta: 0 + 0.5 * 1 - 0.5 = 0; 0 + 0.5 * 0.5 - 1 = -0.75; 1 - 0.5 = 0.5
    # A: 0.5; -0.75 + 0.25 * 0.5 = -0.625; 0 + 0.25 * -0.625 = -0.15625
    assert advantages[0].tolist() == [-0.15625, -0.625, 0.5]
    assert returns[0].tolist() == [0.34375, 0.375, 1.0]
    assert (advantages[1].tolist(), returns[1].tolist()) == ([-2.0], [0.0])
    assert advantages[0].dtype == torch.float32


@given(sequences, factors, factors)
def test_equals_its_definition(batch, discount, trace_decay) -> None:
    rewards = [torch.tensor([r for r, _ in sequence], dtype=torch.float64) for sequence in batch]
    values = [torch.tensor([v for _, v in sequence], dtype=torch.float64) for sequence in batch]
    advantages, returns = generalized_advantages(rewards, values, discount, trace_decay)
    for reward, value, advantage, of_critic in zip(rewards, values, advantages, returns, strict=True):
        torch.testing.assert_close(advantage, definition(reward, value, discount, trace_decay), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_critic, advantage + value, rtol=1e-12, atol=1e-12)


@given(sequences)
def test_undiscounted_with_lambda_one_the_return_is_the_sum_of_what_follows_for_any_critic(batch) -> None:
    rewards = [torch.tensor([r for r, _ in sequence], dtype=torch.float64) for sequence in batch]
    values = [torch.tensor([v for _, v in sequence], dtype=torch.float64) for sequence in batch]
    _, returns = generalized_advantages(rewards, values, discount=1.0, trace_decay=1.0)
    for reward, of_critic in zip(rewards, returns, strict=True):
        torch.testing.assert_close(of_critic, reward.flip(0).cumsum(0).flip(0), rtol=0, atol=1e-12)


def test_whitening_is_over_all_tokens_of_the_batch() -> None:
    batch = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
    whitened = whiten(batch, eps=0.0)
    # mean 3, deviations -2, -1, 3, unbiased variance 14 / 2
    expected = torch.tensor([-2.0, -1.0, 3.0]) / 7**0.5
    torch.testing.assert_close(torch.cat(whitened), expected, rtol=1e-6, atol=0)
    assert [len(sequence) for sequence in whitened] == [2, 1]


@pytest.mark.parametrize("batch", [[], [torch.tensor([3.0])], [torch.tensor([2.0, 2.0]), torch.tensor([2.0])]])
def test_without_variance_whitening_gives_zeros(batch) -> None:
    assert all(torch.equal(sequence, torch.zeros_like(sequence)) for sequence in whiten(batch))


def test_as_the_advantage_of_a_phase_rewards_come_at_the_end_and_penalties_at_every_token() -> None:
    """gamma = lambda = 1, reward 1 at the end, a KL penalty of 0.5 (lp - lp_ref) at every token."""
    objective = ObjectiveConfig(
        space=PostTrain(),
        advantage={"name": "gae", "whiten": False},
        kl=KLConfig(reward_coefficient=0.5),
    )
    experience = replace(
        build_experience([Response((1, 2), (3, 4), (-1.0, -1.0), 1.0, 0)], objective.space, ()),
        values=(torch.tensor([0.25, 0.5]),),
        old_log_probs=(torch.tensor([-1.0, -1.0]),),
        reference_log_probs=(torch.tensor([-1.5, -2.0]),),
    )
    result = with_advantages(experience, objective)
    # token rewards: -0.25, 1 - 0.5; returns: 0.25, 0.5
    assert result.returns[0].tolist() == [0.25, 0.5]
    assert result.advantages[0].tolist() == [0.0, 0.0]
    whitened = objective.model_copy(update={"advantage": objective.advantage.model_copy(update={"whiten": True})})
    assert with_advantages(experience, whitened).returns[0].tolist() == [0.25, 0.5]
