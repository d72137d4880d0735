"""Weighted sums of verifiers, and the parts that are not about the answer."""

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.rewards.pool import Judgement, RewardPool
from megatron_dsrl.rewards.shaping import box_format, length_penalty

PARTS = [
    {"function": "boxed"},
    {"function": "box_format", "weight": 0.1},
    {"function": "length_penalty", "weight": 0.5, "options": {"free_characters": 20, "max_characters": 40}},
]


def test_sum_of_parts_in_the_pool() -> None:
    with RewardPool(RewardConfig(function="combination", options={"parts": PARTS}, workers=1)) as pool:
        responses = [r"It is \boxed{6}", "It is six", r"\boxed{5}, no, \boxed{6}" + " " * 6, "x" * 100]
        futures = [pool.submit(response, "6") for response in responses]
        rewards = [future.result(timeout=30) for future in futures]
    assert [judgement.verdict for judgement in rewards] == ["ok"] * 4
    # right and well-formed; neither; right with two boxes and 30 characters, 10 of 20 over; neither and far too long
    assert [judgement.reward for judgement in rewards] == pytest.approx([1.1, 0.0, 1 - 0.5 * 10 / 20, -0.5])


def test_a_failing_part_fails_the_whole() -> None:
    parts = [{"function": "boxed"}, {"function": "tests.support.reward_functions:misbehaving"}]
    with RewardPool(RewardConfig(function="combination", options={"parts": parts}, workers=1)) as pool:
        assert pool.submit("raise", "6").result(timeout=30) == Judgement(0.0, "error")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "needs at least one part"),
        ([{"function": "boxd"}], r"reward\.options\.parts\.0\.function: unknown verifier 'boxd'"),
        ([{"weight": 1.0}], r"reward\.options\.parts\.0\.function: Field required"),
        ([{"function": "boxed", "wieght": 1.0}], r"reward\.options\.parts\.0\.wieght"),
        ([{"function": "boxed"}, {"function": "boxed", "options": {"x": 1}}], r"parts\.1\.options: boxed does not"),
    ],
)
def test_ill_formed_parts_are_named_before_anything_starts(parts, message) -> None:
    with pytest.raises(UserError, match=message):
        RewardPool(RewardConfig(function="combination", options={"parts": parts}))


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"It is \boxed{6}.", 1.0),
        (r"<think>Try \boxed{5}.</think> It is \boxed{6}.", 1.0),
        (r"\boxed{5} \boxed{6}", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{6", 0.0),
        ("6", 0.0),
        (r"</think> \boxed{6}", 0.0),
        (r"<think>a</think><think>b</think> \boxed{6}", 0.0),
    ],
)
def test_box_format(response, reward) -> None:
    assert box_format(response, "whatever") == reward


def test_length_penalty_falls_in_a_straight_line() -> None:
    penalties = [length_penalty("x" * length, "", 10, 20) for length in (0, 10, 15, 20, 500)]
    assert penalties == [0.0, 0.0, -0.5, -1.0, -1.0]
