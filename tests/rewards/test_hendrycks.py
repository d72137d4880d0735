r"""The released code's comparison, including its oddities.

The expected values are those of verl's `math_reward.compute_score`. (Both agree on 300,000 random answers that were put
together from LaTeX fragments.)
"""

import pytest

from megatron_dsrl.rewards.hendrycks import hendrycks, hendrycks_answer, last_box


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"so \boxed{5}.", "5", 1.0),
        (r"\boxed{1} then \boxed{2}", "2", 1.0),
        (r"\boxed 5$ is it", "5", 1.0),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{1/2}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\sqrt3}", r"\sqrt{3}", 1.0),
        (r"\boxed{x=5}", "5", 1.0),
        (r"\boxed{5\text{ cm}}", "5", 1.0),
        (r"\boxed{90^\circ}", "90", 1.0),
        (r"\boxed{50\%}", "50", 1.0),
        (r"\boxed{.5}", r"\frac12", 1.0),
        (r"\boxed{1, 2}", "1,2", 1.0),
        (r"\boxed{\\frac{1}{2}}", r"\frac{1}{2}", 1.0),  # doubled backslashes
        (r"<think>\boxed{5}</think>", "5", 1.0),  # also in the thinking
        # what a mathematician would accept, and it does not
        (r"\boxed{5}", r"\boxed{5}", 0.0),
        (r"\boxed{1,234}", "1234", 0.0),
        (r"\boxed{27.0}", "27", 0.0),
        (r"\boxed{025}", "25", 0.0),
        (r"\boxed{\text{No}}", "No", 0.0),
        (r"\boxed{5\text{cm}}", "5", 0.0),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 0.0),
        (r"\fbox{5}", "5", 0.0),
        # no answer
        (r"\boxed{5", "5", 0.0),
        ("5", "5", 0.0),
        # malformed answers equal only themselves
        (r"\boxed{\frac}", r"\frac", 1.0),
        (r"\boxed{\sqrt}", r"\sqrt ", 0.0),
        (r"\boxed{1\text{ a}\text{ b}}", "1", 0.0),
    ],
)
def test_reward(response, answer, reward) -> None:
    assert hendrycks(response, answer) == reward


def test_last_box_counts_all_braces() -> None:
    assert last_box(r"\boxed{\frac{1}{2}} and") == r"\frac{1}{2}"
    assert last_box(r"\boxed{\{1\}}") == r"\{1\}"


def test_answers_for_a_vote() -> None:
    assert hendrycks_answer(r"\boxed{1/2}") == hendrycks_answer(r"\boxed{\tfrac12}") == r"\frac{1}{2}"
    assert hendrycks_answer("nothing") is None
