"""Which letter a response chose, and that it cannot choose two."""

import pytest

from megatron_dsrl.rewards.multiple_choice import chosen_letter, multiple_choice


@pytest.mark.parametrize(
    ("response", "choice"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{\textbf{C}}", "C"),
        (r"\boxed{C. The third}", "C"),
        (r"\boxed{C) \text{Wants, Fear}}", "C"),
        (r"\boxed{(B) Yes or no}", "B"),
        (r"First \boxed{A}, but no: \boxed{B}", "B"),
        (r"The answer is (A). \boxed{B}", "B"),
        ("The answer is (C).", "C"),
        ("the answer is **C**", "C"),
        ("Answer: C", "C"),
        ("The answer is: (C) Wants, Fear", "C"),
        ("The answer is A because of this.", "A"),
        ("Answer: C) 42 kJ", "C"),
        ("The correct option is C).", "C"),
        ("ANSWER: c", "C"),
        ("Therefore, option (C) is correct.", "C"),
        ("The best answer is option C: something.", "C"),
        ("The correct choice is **C**", "C"),
        ("Choice C is the correct one.", "C"),
        ("So the answer is:\n C", "C"),
        ("Option (A) is correct? No, option (C) is correct.", "C"),
        ("The answer is (A). Wait, the answer is (D).", "D"),
        ("<think>The answer is (A)</think> The answer is (B).", "B"),
    ],
)
def test_choice(response, choice) -> None:
    assert chosen_letter(response) == choice


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{A or B}",
        r"\boxed{A, B}",
        r"\boxed{A/B}",
        r"\boxed{(A) and (C)}",
        r"\boxed{AB}",
        r"\boxed{}",
        r"\boxed{The third}",
        r"\boxed{c}",
        r"The answer is (C). \boxed{C",
        "The answer is (A) or (B).",
        "The answer is A, B, or C.",
        "The answer is A matter of taste.",
        "The choice is a matter of taste.",
        "Option A is not correct.",
        "Answer: A and C",
        "The answer is I think unknown.",
        "C",
        "It is (C).",
        "<think>The answer is (C)",
    ],
)
def test_no_choice_or_several(response) -> None:
    assert chosen_letter(response) is None


def test_reward() -> None:
    assert multiple_choice("The answer is (C).", "C") == 1.0
    assert multiple_choice("The answer is (C).", "(B)") == 0.0
    assert multiple_choice("The answer is (C).", "C", require_box=True) == 0.0
    assert multiple_choice(r"\boxed{J}", "J", require_box=True) == 1.0


def test_a_gold_answer_that_is_not_a_letter_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be one letter, not '7'"):
        multiple_choice("The answer is (C).", "7")
