"""Short answers in words: what the last statement says."""

import pytest

from megatron_dsrl.rewards.short_answer import short_answer


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("So the answer is False.", "False", 1.0),
        ("So the answer is **no**.", "No", 1.0),
        ("The answer is yes. No: the answer is no.", "yes", 0.0),
        ("The answer is yes. No: the answer is no.", "no", 1.0),
        ("So the answer is (B).", "(B)", 1.0),
        ("So the answer is B.", "(B)", 1.0),
        ("So the answer is (B) 12/25/1937.", "(B)", 1.0),
        ("So the answer is (A) or (B).", "(B)", 0.0),
        (r"So the answer is \boxed{(B)}.", "(B)", 1.0),
        (r"It is \boxed{valid}", "valid", 1.0),
        ("So the answer is invalid.", "valid", 0.0),
        ("So the answer is } ] ).", "} ] )", 1.0),
        ("So the answer is } ].", "} ] )", 0.0),
        ("So the answer is apple, pear, quince", "apple pear quince", 1.0),
        ("So the answer is pear apple", "apple pear", 0.0),
        ("So the answer is -50.", "-50", 1.0),
        ("So the answer is 0.5.", "0.5", 1.0),
        ('So the answer is "No".', "no", 1.0),
        (r"\boxed{\text{No}}", "No", 1.0),
        ("**Answer:** yes", "Yes", 1.0),
        ("**Answer: No**", "No", 1.0),
        ("Answer: (B)", "(B)", 1.0),
        ("No.", "no", 0.0),
        ("<think>So the answer is no.</think> Yes.", "no", 0.0),
        ("So the answer is", "no", 0.0),
    ],
)
def test_short_answer(response, answer, reward) -> None:
    assert short_answer(response, answer) == reward
