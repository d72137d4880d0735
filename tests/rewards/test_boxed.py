"""Which answers are boxed, and which spellings are the same answer."""

import json

import pytest

from megatron_dsrl.rewards.boxed import boxed, last_boxed, normalise


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5$ is it", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {4}", "4"),
        (r"\boxed{1} and then \boxed{2 + ", None),
        (r"\boxed{", None),
        ("the answer is 5", None),
        (r"\boxedtext{5}", None),
    ],
)
def test_last_boxed(text, content) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        ("1/2", r"\frac{1}{2}"),
        ("-3/4", r"-\frac{3}{4}"),
        ("0.5", r"\frac{1}{2}"),
        (".5", "0.5"),
        ("(-.25, 1)", "(-0.25,1)"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"\sqrt\pi", r"\sqrt{\pi}"),
        (r"5\text{ cm}^2", "5"),
        (r"5 \mbox{ inches}", "5"),
        (r"\text{Tuesday}", "Tuesday"),
        (r"\text{(A)}", "(A)"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$18.90", "18.90"),
        ("$7$", "7"),
        (r"50\%", "50"),
        ("1,234,567", "1234567"),
        ("10{,}000", "10000"),
        (r"10,\!080", "10080"),
        ("x = 5", "5"),
        ("x_1=5", "5"),
        ("x^{2}+1", "x^2 + 1"),
        ("5.", "5"),
        (r"\mathrm{E}", "E"),
        ("025", "25"),
        ("-07", "-7"),
        ("142.0", "142"),
        ("000", "0"),
    ],
)
def test_spellings_of_the_same_answer(one, other) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12", "1,2"),
        ("(1,000)", "1000"),
        ("5", "-5"),
        ("x", "y"),
        (r"\sqrt{2}", "2"),
        ("x^{12}", "x^12"),
        ("9", ".9"),
        ("100", "1"),
        ("7.01", "7"),
    ],
)
def test_different_answers_stay_different(one, other) -> None:
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"We get \boxed{0.5}", r"\frac12", 1.0),
        (r"First \boxed{5}, no: \boxed{6}", "6", 1.0),
        (r"First \boxed{5}, no: \boxed{6}", "5", 0.0),
        ("We get 6", "6", 0.0),
        (r"\boxed{6}", r"The sum is $\boxed{6}$.", 1.0),
        (r"\boxed{6", "6", 0.0),
        (r"\boxed{}", "6", 0.0),
        (r"\boxed{}", "", 0.0),
        (r"<think>I try \boxed{6}</think> It is 6.", "6", 0.0),
        (r"<think>I try \boxed{5}</think> So \boxed{6}.", "6", 1.0),
        (r"<think>I try \boxed{6}", "6", 0.0),
    ],
)
def test_boxed(response, answer, reward) -> None:
    assert boxed(response, answer) == reward


@pytest.mark.needs_data
def test_gold_solutions_of_math500_are_right(data_folder) -> None:
    with open(data_folder / "benchmarks" / "math500.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]

    wrong = [row["answer"] for row in rows if boxed(row["solution"], row["answer"]) != 1.0]

    assert len(rows) == 500
    assert wrong == []


@pytest.mark.parametrize(("given", "answer"), [("32, 349", "32349"), ("10100", "10, 100"), (r"1,\ 234", "1234")])
def test_a_list_is_not_a_number(given, answer) -> None:
    assert boxed(rf"\boxed{{{given}}}", answer) == 0.0


def test_a_list_in_another_spelling_is_the_same_list() -> None:
    assert boxed(r"\boxed{10, 100}", "10,100") == 1.0
    assert normalise("1, 234") == "1,234" and normalise(r"1,\!234") == normalise("1,234") == "1234"
