"""Mathematically equal answers are right in any form; nothing but the last box is looked at."""

import json

import pytest

from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.rewards.math_verify import math_verify
from megatron_dsrl.rewards.pool import RewardPool


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (r"\frac12", "0.5"),
        ("25", "025"),
        ("27", "27.0"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("5, 3, 1", "1,3,5"),
        ("84,69", "$69$,$84$"),
        ("8, 221", "$221,$8$"),
        (r"x \cdot x", "x^2"),
        ("x=5", "5"),
        ("1,234", "1234"),
        ("-2,2", r"\pm 2"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\dfrac{14}{3}", r"The solution is $\boxed{\frac{14}{3}}$."),
        ("(3,4),(1,2)", "$(1,2),(3,4)$"),
        (r"\left\{1, 2\right\}", r"\{2, 1\}"),
        ("0.333333", r"\frac{1}{3}"),
    ],
)
def test_equal_answers(given, answer):
    assert math_verify(rf"So it is \boxed{{{given}}}.", answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("the answer is 6", "6"),  # not boxed
        ("blah 1 2 6", "6"),
        (r"$6$", "6"),
        (r"\boxed{6} or \boxed{7}", "6"),  # the last box only
        (r"\boxed{5}, \boxed{6}", "5,6"),  # and not both as a set
        (r"\boxed{5,6,7}", "6"),  # more than was asked for
        (r"\boxed{6}", "5,6"),  # less than was asked for
        (r"\boxed{}", "6"),
        (r"\boxed{ }", ""),
        (r"\boxed{6", "6"),
        (r"<think>\boxed{6}</think> It is six.", "6"),
        (r"\boxed{6 \text{ or } 7}", "6"),
        (r"\boxed{(2,1)}", "(1,2)"),
        (r"\boxed{[1,2]}", "(1,2)"),
        (r"\boxed{0.33}", r"\frac{1}{3}"),
        (r"\boxed{\sqrt{}", "6"),
        (r"\boxed{\text{false}}", "true"),
    ],
)
def test_wrong_and_dishonest_answers(response, answer):
    assert math_verify(response, answer) == 0.0


def test_gold_interval_accepts_what_an_inequality_says_only_one_way_round():
    """The asymmetry of math-verify, written down: the gold answer decides about the form."""
    assert math_verify(r"\boxed{(1,2)}", "1<x<2") == 1.0
    assert math_verify(r"\boxed{1<x<2}", "(1,2)") == 0.0


@pytest.mark.needs_data
def test_gold_solutions_of_math500_are_right_and_those_of_the_next_problem_wrong(data_folder):
    with open(data_folder / "benchmarks" / "math500.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:20]
    with RewardPool(RewardConfig(function="math_verify")) as pool:
        right = [pool.submit(row["solution"], row["answer"]) for row in rows]
        wrong = [pool.submit(row["solution"], after["answer"]) for row, after in zip(rows, [*rows[1:], rows[0]])]
        assert [future.result().reward for future in right] == [1.0] * 20
        assert [n for n, future in enumerate(wrong) if future.result().reward != 0.0] == []
