"""Which saved rollouts the report shows."""

from pathlib import Path

from megatron_dsrl.common.text import shortened
from megatron_dsrl.report.sampled_responses import MAX_CHARACTERS, SAMPLES_PER_GROUP, choose_groups, shown_steps
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from tests.observability.synthetic_run import make_group


def test_one_group_of_each_kind_comes_first() -> None:
    groups = [make_group(rewards, index) for index, rewards in enumerate([[0, 0], [0, 0], [1, 1], [1, 0], [1, 0]])]
    assert [group.prompt.index for group in choose_groups(groups, 4)] == [3, 0, 2, 1]
    assert [group.prompt.index for group in choose_groups(groups[:2], 4)] == [0, 1]


def test_first_middle_and_last_recorded_step_without_left_overs_of_a_forgotten_future(tmp_path: Path) -> None:
    for step in (2, 3, 4, 9):
        write_groups(rollout_file(tmp_path, step), [make_group([1.0] * (SAMPLES_PER_GROUP + 2))])
    shown = shown_steps(tmp_path, steps=[1, 2, 3, 4])
    assert list(shown) == [2, 3, 4]
    group = shown[2][0]
    assert (len(group.samples), group.hidden_samples, group.kind) == (SAMPLES_PER_GROUP, 2, "solved")


def test_a_very_long_response_keeps_its_beginning_and_end() -> None:
    text = "a" * MAX_CHARACTERS + "b" * 500 + "c" * MAX_CHARACTERS
    short = shortened(text, MAX_CHARACTERS)
    assert short.startswith("aaa") and short.endswith("ccc") and "b" not in short
    assert f"[… {len(text) - MAX_CHARACTERS:,} characters left out …]" in short.replace("\n", "")
    assert shortened("a" * MAX_CHARACTERS, MAX_CHARACTERS) == "a" * MAX_CHARACTERS
