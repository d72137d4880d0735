"""Group advantages against hand-worked numbers and the properties that the filters rely on."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.algorithms.advantages import group_mean_advantage, group_standardised_advantage

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1])


def test_group_mean_weighs_a_wrong_sample_by_minus_the_success_rate():
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.0, 0.0])
    assert torch.equal(group_mean_advantage(REWARDS, GROUPS), expected)


def test_group_standardised_divides_by_the_unbiased_deviation():
    # mean 1/4; squares 9/16 + 3/16 = 3/4; variance 3/4 / 3 = 1/4; deviation 1/2
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5, 0.0, 0.0])
    torch.testing.assert_close(group_standardised_advantage(REWARDS, GROUPS, eps=1e-6), expected, rtol=1e-5, atol=0)


def test_a_group_of_one_has_no_advantage():
    assert group_standardised_advantage(torch.tensor([1.0]), torch.tensor([0])).tolist() == [0.0]


@st.composite
def batches(draw):
    groups = draw(st.lists(st.integers(0, 4), min_size=1, max_size=24).map(sorted))
    numbered = torch.tensor([sorted(set(groups)).index(g) for g in groups])
    rewards = draw(st.lists(st.floats(-2, 2, width=32), min_size=len(groups), max_size=len(groups)))
    return torch.tensor(rewards, dtype=torch.float64), numbered


@given(batch=batches(), shift=st.floats(-3, 3))
def test_a_shift_of_all_rewards_changes_nothing(batch, shift):
    rewards, groups = batch
    torch.testing.assert_close(group_mean_advantage(rewards + shift, groups), group_mean_advantage(rewards, groups))


@given(reward=st.floats(-10, 10), size=st.integers(1, 16))
def test_uniform_groups_have_exactly_no_advantage(reward, size):
    rewards, groups = torch.full((size,), reward), torch.zeros(size, dtype=torch.int64)
    assert group_mean_advantage(rewards, groups).abs().max() == 0
    assert group_standardised_advantage(rewards, groups).abs().max() == 0
