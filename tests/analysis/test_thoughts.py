"""Thoughts by word lists, each rule on texts that are counted by hand."""

import pytest

from megatron_dsrl.analysis.responses import RecordedResponse
from megatron_dsrl.analysis.thoughts import ThoughtCounts, count_thoughts, split_thoughts, summary, thoughts_of_step


def test_thoughts_are_the_parts_between_blank_lines() -> None:
    text = "First.\nstill first\n\nSecond.\n \t\n\n\nThird.\n\n"

    assert split_thoughts(text) == ["First.\nstill first", "Second.", "Third."]
    assert split_thoughts("") == split_thoughts(" \n\n ") == []


@pytest.mark.parametrize(
    ("thought", "kind"),
    [
        ("Wait, 3 is odd.", "reflection"),
        ("  wait", "reflection"),
        ("Waiting lines are long.", "reflection"),  # a prefix, not a word
        ("We wait for the train.", "neither"),  # not at the beginning
        ("Verifying: 2 + 2 = 4.", "reflection"),  # a phrase is found inside words
        ("I want to Make Sure of it.", "reflection"),
        ("Hold on.", "reflection"),
        ("Let us think again.", "reflection"),
        ("That's correct.", "reflection"),
        ("That is correct.", "neither"),
        ("So it's incorrect.", "reflection"),
        ("Now let me check the case n = 1.", "reflection"),
        ("Let me solve it.", "neither"),
        ("This seems right.", "reflection"),
        ("Alternatively, use induction.", "transition"),
        ("We could alternatively use induction.", "neither"),
        ("There is another way.", "transition"),
        ("Another approach is geometry.", "transition"),
        ("another method", "transition"),
        ("another solution", "transition"),
        ("another strategy", "transition"),
        ("another technique", "transition"),
        ("another number", "neither"),
        ("Let us think differently.", "transition"),
        ("Alternatively, let me check another way.", "reflection"),  # reflection comes first
    ],
)
def test_the_kind_of_a_thought(thought, kind) -> None:
    expected = ThoughtCounts(1, reflections=int(kind == "reflection"), transitions=int(kind == "transition"))

    assert count_thoughts(thought) == expected


def test_a_response_counted_by_hand() -> None:
    text = "The sum is 12.\n\nWait, that seems right.\n\nAnother way: halves.\n\nLet me check: verify.\n\nSo 12."

    assert count_thoughts(text) == ThoughtCounts(5, reflections=2, transitions=1)


def test_means_of_a_step_and_growth_over_steps() -> None:
    reflects, moves_on, plain = "Wait.\n\nHold on.", "Alternatively, halves.", "So 12."

    def step(number: int, *texts: tuple[str, float]) -> dict:
        responses = [RecordedResponse(number, 0, i, "", text, reward, 1) for i, (text, reward) in enumerate(texts)]
        return thoughts_of_step(number, responses)

    first = step(1, (reflects, 1.0), (moves_on, 0.0), (plain, 0.0), (plain, 0.0))
    last = step(20, (reflects, 0.0), (reflects, 0.0))

    assert (first["thoughts"], first["reflections"], first["transitions"]) == (5 / 4, 2 / 4, 1 / 4)
    assert (first["reflections_of_right"], first["reflections_of_others"]) == (2, 0)
    assert first["transitions_of_others"] == 1 / 3
    assert last["reflections_of_right"] is None
    figures = summary([first, last])
    assert figures["reflections_growth"] == 4.0  # 2 per response after 0.5
    assert figures["transitions_growth"] == 0.0
    assert summary([last, first])["transitions_growth"] is None  # from nothing
