"""Every advantage against hand-worked numbers, its published formula written out again, and its properties."""

import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.algorithms.advantages import (
    Fixed,
    GroupMean,
    GroupStandardised,
    LeaveOneOut,
    RawReward,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    group_mean_advantage,
    group_standardised_advantage,
    leave_one_out_advantage,
    rewards_to_go,
)
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.objective import with_advantages
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain, Space
from megatron_dsrl.config.phase import ObjectiveConfig
from tests.support.experiences import experience_of

REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
GROUPS = [0, 0, 0, 0, 1, 1]


def per_sample(advantage, rewards=REWARDS, groups=GROUPS) -> list[float]:
    """The advantage of each sample; all its tokens must have the same."""
    estimate = advantage.estimate(experience_of(rewards, groups, lengths=[1 + i % 3 for i in range(len(rewards))]))
    assert all(len(tokens.unique()) == 1 for tokens in estimate.advantages)
    return [tokens[0].item() for tokens in estimate.advantages]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        # a wrong sample weighs minus the success rate
        (GroupMean(), [0.75, -0.25, -0.25, -0.25, 0, 0]),
        # mean 1/4; squares 9/16 + 3/16 = 3/4; unbiased variance 3/4 / 3 = 1/4; deviation 1/2
        (GroupStandardised(), [1.5, -0.5, -0.5, -0.5, 0, 0]),
        # the others of the right sample have mean 0, those of a wrong one 1/3
        (LeaveOneOut(), [1, -1 / 3, -1 / 3, -1 / 3, 0, 0]),
        (RawReward(), [1, 0, 0, 0, 1, 1]),
        (Fixed(), [1, -1, -1, -1, 1, 1]),
        # W-REINFORCE
        (Fixed(positive=0.1), [0.1, -1, -1, -1, 0.1, 0.1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_by_hand(advantage, expected) -> None:
    assert per_sample(advantage) == pytest.approx(expected, rel=1e-5)


def test_fixed_weighs_wrong_samples_of_all_wrong_groups_too() -> None:
    assert per_sample(Fixed(), [0.0, 0.0], [0, 0]) == [-1, -1]
    assert per_sample(GroupMean(), [0.0, 0.0], [0, 0]) == [0, 0]


@pytest.mark.parametrize("advantage", [GroupMean(), GroupStandardised(), LeaveOneOut()], ids=lambda a: a.name)
def test_a_sample_without_others_has_no_advantage(advantage) -> None:
    assert per_sample(advantage, [1.0, 0.5], [0, 1]) == [0, 0]
    assert advantage.compares_samples


def test_reinforce_pp_standardises_over_the_tokens_of_the_batch() -> None:
    """Rewards 1 and 0 over 1 and 3 tokens: mean 1/4 and unbiased variance (9/16 + 3/16) / 3 = 1/4 over tokens."""
    estimate = ReinforcePlusPlus().estimate(experience_of([1.0, 0.0], [0, 1], lengths=[1, 3]))
    expected = [torch.tensor([1.5]), torch.tensor([-0.5, -0.5, -0.5])]
    torch.testing.assert_close(list(estimate.advantages), expected, rtol=1e-6, atol=0)


def test_reinforce_pp_sums_the_penalties_still_to_come() -> None:
    """Penalties 1, 2, 4 and reward 10: to go 3, 4, 6 -> mean 13/3, then standardised."""
    experience = experience_of([10.0], [0], lengths=[3], penalties=[torch.tensor([1.0, 2.0, 4.0])])
    assert [r.tolist() for r in rewards_to_go(experience.token_rewards)] == [[3, 4, 6]]
    to_go = [3.0, 4.0, 6.0]
    expected = [(x - statistics.mean(to_go)) / statistics.stdev(to_go) for x in to_go]
    assert ReinforcePlusPlus().estimate(experience).advantages[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_reinforce_pp_baseline_centres_in_the_group_and_standardises_over_tokens() -> None:
    """A published formula over padded tensors, as Transformers-based trainers write it, on ragged groups."""
    rewards, groups, lengths = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0, 0, 0, 1, 1, 1, 1], [2, 5, 1, 3, 3, 4, 2]
    mask = torch.arange(5)[None, :] < torch.tensor(lengths)[:, None]
    means = {g: statistics.mean(r for r, k in zip(rewards, groups) if k == g) for g in groups}
    scores = torch.tensor([r - means[g] for r, g in zip(rewards, groups)])[:, None] * mask
    mean = scores.sum() / mask.sum()
    variance = ((scores - mean).square() * mask).sum() / (mask.sum() - 1)
    padded = (scores - mean) / (variance + 1e-8).sqrt()
    estimate = ReinforcePlusPlusBaseline().estimate(experience_of(rewards, groups, lengths))
    for row, length, actual in zip(padded, lengths, estimate.advantages):
        torch.testing.assert_close(actual, row[:length], rtol=1e-5, atol=1e-6)


def test_the_penalties_of_its_tokens_count_against_a_sample() -> None:
    """Rewards 1 and 0, penalties of 0.5 in all and none: worth 0.5 and 0."""
    penalties = [torch.tensor([0.2, 0.3]), torch.tensor([0.0])]
    experience = experience_of([1.0, 0.0], [0, 0], lengths=[2, 1], penalties=penalties)
    advantages = GroupMean().estimate(experience).advantages
    assert [a.tolist() for a in advantages] == [pytest.approx([0.25, 0.25]), pytest.approx([-0.25])]


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    groups = draw(st.lists(st.integers(0, 4), min_size=1, max_size=24).map(sorted))
    numbered = torch.tensor([sorted(set(groups)).index(g) for g in groups])
    rewards = draw(st.lists(st.floats(-2, 2, width=32), min_size=len(groups), max_size=len(groups)))
    return torch.tensor(rewards, dtype=torch.float64), numbered


@given(batch=batches())
def test_group_advantages_equal_their_formulas_group_by_group(batch) -> None:
    """The formulas of GRPO, Dr.GRPO and RLOO over plain lists of each group."""
    rewards, groups = batch
    for group in groups.unique():
        of_group = rewards[groups == group].tolist()
        mean, size = statistics.fmean(of_group), len(of_group)
        deviation = statistics.stdev(of_group) if size > 1 else 0.0
        others = [(sum(of_group) - r) / (size - 1) if size > 1 else r for r in of_group]
        for advantage, expected in [
            (group_mean_advantage(rewards, groups), [r - mean for r in of_group]),
            (group_standardised_advantage(rewards, groups, 0.1), [(r - mean) / (deviation + 0.1) for r in of_group]),
            (leave_one_out_advantage(rewards, groups), [r - other for r, other in zip(of_group, others)]),
        ]:
            assert advantage[groups == group].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(batch=batches(), shift=st.floats(-3, 3))
def test_a_shift_of_all_rewards_changes_nothing(batch, shift) -> None:
    rewards, groups = batch
    for advantage in (group_mean_advantage, leave_one_out_advantage):
        torch.testing.assert_close(advantage(rewards + shift, groups), advantage(rewards, groups))


@given(batch=batches(), scale=st.floats(0.1, 10))
def test_standardising_takes_the_scale_of_rewards_out(batch, scale) -> None:
    rewards, groups = batch
    rewards = rewards.round(decimals=3)  # a deviation near eps would show it
    one, other = (group_standardised_advantage(r, groups, eps=1e-12) for r in (rewards, rewards * scale))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@given(batch=batches())
def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_1(batch) -> None:
    rewards, groups = batch
    sizes = torch.bincount(groups)[groups].double()
    expected = group_mean_advantage(rewards, groups) * torch.where(sizes > 1, sizes / (sizes - 1), 1)
    torch.testing.assert_close(leave_one_out_advantage(rewards, groups), expected)


@given(reward=st.floats(-10, 10), size=st.integers(1, 16))
def test_uniform_groups_have_exactly_no_advantage(reward, size) -> None:
    rewards, groups = torch.full((size,), reward), torch.zeros(size, dtype=torch.int64)
    for advantage in (group_mean_advantage, group_standardised_advantage, leave_one_out_advantage):
        assert advantage(rewards, groups).abs().max() == 0


STUDENT = (torch.tensor([-1.0, -2.0]), torch.tensor([-0.5]))
TEACHER = (torch.tensor([-0.5, -5.0]), torch.tensor([-0.5]))


def distillation_advantages(space: Space, **options: float) -> list[list[float]]:
    responses = [Response([1, 2], [3, 4], [-1.0, -2.0], reward=1.0, group=0), Response([1, 2], [5], [-0.5], 0.0, 0)]
    experience = build_experience(responses, space, context_ids=[9])
    experience = replace(experience, old_log_probs=STUDENT, reference_log_probs=TEACHER)
    objective = ObjectiveConfig.model_validate(
        {"space": space.name, "advantage": {"name": "distillation", **options}}, strict=False
    )
    result = with_advantages(experience, objective).advantages
    assert result is not None
    return [one.tolist() for one in result]


@pytest.mark.parametrize("space", [PostTrain(), PreTrain()])
def test_each_token_is_compared_with_the_teacher_whatever_its_reward(space: Space) -> None:
    assert distillation_advantages(space) == [[0.5, -3.0], [0.0]]
    assert distillation_advantages(space, clip=1.0) == [[0.5, -1.0], [0.0]]


def test_its_expected_gradient_is_that_of_the_reverse_kl_divergence() -> None:
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    student, teacher = torch.log_softmax(logits, -1), torch.log_softmax(torch.randn(7, dtype=torch.float64), -1)
    (of_kl,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)
    weights = (student.exp() * (teacher - student)).detach()
    (of_policy_loss,) = torch.autograd.grad(-(weights * student).sum(), logits)
    torch.testing.assert_close(of_policy_loss, of_kl, rtol=1e-12, atol=1e-12)
