"""Mathematically equal answers are right in any form; only the last box counts."""

import json

import pytest

from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.rewards.math_verify import math_verify
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rewards.registry import matched_by_spelling


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
        ("18.9", r"\$18.90"),
        ("32348", r"\$32,\!348"),
        (r"62.50\%", "62.5%"),
        (r"\frac{125}{2}\%", "62.5%"),
        (r"\frac{100}{2}", r"50\%"),
        (r"-\frac{1}{3}", "-1./3"),
        ("-1.5", "-3./2"),
        (r"\arcsin(\frac{10}{13})", "np.arcsin(10/13)"),
        (r"\frac{E_1+2E_2}{3}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"),
        (
            r"\hbar \omega(v+\frac12)-\frac{e^2E_0^2}{2m\omega^2}",
            r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}",
        ),
        ("n^2-n-1", r"$m_{\max }=n^{2}-n-1$"),
        ("10, 100", "10,100"),
        ("4210_{5}", "4210_5"),
        ("(4210)_5", "4210_5"),
        ("2+4=6", "6"),
        ("f(2)=6", "6"),
        (r"\frac{12}{2}=6", "6"),
    ],
)
def test_equal_answers(given, answer) -> None:
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
        (r"\boxed{32, 349}", "32349"),  # a list is not a number
        (r"\boxed{10100}", "10, 100"),
        (r"\boxed{4210}", "4210_5"),  # without its base
        (r"\boxed{4210_6}", "4210_5"),
        (r"\boxed{2}", "2_3"),
        (r"\boxed{5=6}", "6"),
        (r"\boxed{5=6=6}", "6"),
        (r"\boxed{\frac13}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"),
        (r"\boxed{\frac{E_1+E_2}{3}}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"),
        (r"\boxed{I_1}", "I_2"),
    ],
)
def test_wrong_and_dishonest_answers(response, answer) -> None:
    assert math_verify(response, answer) == 0.0


def test_gold_interval_accepts_what_an_inequality_says_only_one_way_round() -> None:
    """The asymmetry of math-verify, written down: the gold answer decides about the form."""
    assert math_verify(r"\boxed{(1,2)}", "1<x<2") == 1.0
    assert math_verify(r"\boxed{1<x<2}", "(1,2)") == 0.0


@pytest.mark.needs_data
def test_gold_solutions_of_math500_are_right_and_those_of_the_next_problem_wrong(data_folder) -> None:
    with open(data_folder / "benchmarks" / "math500.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:20]
    with RewardPool(RewardConfig(function="math_verify")) as pool:
        right = [pool.submit(row["solution"], row["answer"]) for row in rows]
        wrong = [pool.submit(row["solution"], after["answer"]) for row, after in zip(rows, [*rows[1:], rows[0]])]
        assert [future.result().reward for future in right] == [1.0] * 20
        assert [n for n, future in enumerate(wrong) if future.result().reward != 0.0] == []


@pytest.mark.needs_data
def test_every_gold_answer_of_the_six_benchmarks_that_a_person_can_read_is_parsed(data_folder) -> None:
    """All but one: OlympiadBench has lost the sign of `t \\in (0,4]`."""
    unparsed = []
    for name in ("math500", "aime24", "aime25", "amc23", "minerva_math", "olympiadbench"):
        for line in (data_folder / "benchmarks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            gold = row.get("answer", row.get("final_answer", row.get("solution")))
            unparsed += matched_by_spelling("math_verify", gold if isinstance(gold, list) else [str(gold)])
    assert unparsed == ["$t(0,4]$"]
