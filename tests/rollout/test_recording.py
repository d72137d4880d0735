"""Saved rollouts come back exactly, and replay takes only what fits."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.recording import RolloutRecorder, read_groups, rollout_file, write_groups
from megatron_dsrl.rollout.sample import Sample, SampleGroup
from megatron_dsrl.rollout.without_engines import replayed_groups

PROMPTS = [Prompt(index, f"what is\u2028 {index}?\n", (1, 2, index), str(index), ("other",)) for index in range(3)]


def config(prompts: int = 3, samples: int = 2, **settings: object) -> RolloutConfig:
    return RolloutConfig(prompts_per_step=prompts, samples_per_prompt=samples, **settings)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list[SampleGroup]]:
    sample = Sample((4, 5), (-0.1, -1.2345678901234567e-7), 'é\u2028 "\\boxed{1}"', "length", 3, 0.25, "timeout")
    other = replace(sample, finish_reason="stop", verdict="ok", scored=(True, False))
    groups = [SampleGroup(prompt, (sample, other)) for prompt in PROMPTS]
    write_groups(rollout_file(tmp_path, 12), groups)
    return tmp_path, groups


def test_reading_gives_back_what_was_written(saved) -> None:
    folder, groups = saved

    assert read_groups(folder / "rollouts" / "step_000012.jsonl") == groups
    assert [file.name for file in (folder / "rollouts").iterdir()] == ["step_000012.jsonl"]


def test_replay_of_the_same_batch(saved) -> None:
    folder, groups = saved

    assert replayed_groups(folder, 12, PROMPTS[::-1], config()) == (groups, [])


def test_replay_takes_what_was_trained_on_however_it_was_sampled(saved) -> None:
    """The other groups of dynamic sampling are recorded for reading."""
    folder, groups = saved
    write_groups(rollout_file(folder, 1), [groups[2], groups[0]], [groups[1]])

    assert read_groups(rollout_file(folder, 1)) == [groups[2], groups[0], groups[1]]
    settings = {"dynamic_sampling": {}, "partial_rollouts": {}}
    assert replayed_groups(folder, 1, PROMPTS, config(**settings)) == ([groups[2], groups[0]], [groups[1]])


@pytest.mark.parametrize(
    ("step", "prompts", "changes", "message"),
    [
        (13, PROMPTS, {}, "rollout.replay_from: .*step_000013.jsonl does not exist"),
        (12, PROMPTS, {"prompts": 4}, "holds 3 prompts that were trained on, but this run takes 4 per step"),
        (12, PROMPTS, {"prompts": 2}, "holds 3 prompts that were trained on, but this run takes 2 per step; set"),
        (12, PROMPTS, {"samples": 4}, "2 samples of prompt 0, but this run takes 4; set rollout.samples_per_prompt=2"),
        (12, PROMPTS[:2], {}, "holds prompt 2, which this run does not have; use the same data"),
        (12, [*PROMPTS[:2], replace(PROMPTS[2], token_ids=(1,))], {}, "prompt 2, which this run has in another form"),
    ],
)
def test_replay_refuses_what_does_not_fit(saved, step, prompts, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        replayed_groups(saved[0], step, prompts, config(**changes))


def test_experts_are_replayed_where_they_are_wanted(tmp_path) -> None:
    sample = Sample((4, 5), (-0.1, -0.2), "text", "stop", 3, 1.0, routed_experts="AAEB")
    group = SampleGroup(PROMPTS[0], (sample, replace(sample, routed_experts="AQEA")))
    write_groups(rollout_file(tmp_path, 1), [group], [replace(group, samples=(sample, sample))])
    assert replayed_groups(tmp_path, 1, PROMPTS, config(routing_replay=True))[0] == [group]
    (without,), (other,) = replayed_groups(tmp_path, 1, PROMPTS, config())
    assert other.samples == without.samples
    assert without.samples == (replace(sample, routed_experts=None),) * 2

    write_groups(rollout_file(tmp_path, 2), [without], [group])
    with pytest.raises(UserError, match="step_000002.jsonl does not record which experts .*routing_replay=true"):
        replayed_groups(tmp_path, 2, PROMPTS, config(routing_replay=True))


def test_a_damaged_file_is_named_with_its_line(saved) -> None:
    file = rollout_file(saved[0], 12)
    file.write_text(file.read_text(encoding="utf-8") + '{"prompt": {}}\n', encoding="utf-8")

    with pytest.raises(UserError, match="step_000012.jsonl, line 4: not a group"):
        read_groups(file)


def test_the_recorder_writes_every_step_and_waits_when_asked(saved) -> None:
    folder, groups = saved

    with RolloutRecorder(folder) as recorder:
        for step in (1, 2, 3):
            recorder.record(step, groups)
            assert step == 1 or read_groups(rollout_file(folder, step - 1)) == groups
        recorder.flush()
        assert read_groups(rollout_file(folder, 3)) == groups
        recorder.record(4, groups[:1])
    assert read_groups(rollout_file(folder, 4)) == groups[:1]


def test_what_was_recorded_before_a_failure_of_the_run_is_on_disk(saved) -> None:
    folder, groups = saved

    with pytest.raises(ZeroDivisionError), RolloutRecorder(folder) as recorder:
        recorder.record(1, groups)
        raise ZeroDivisionError
    assert read_groups(rollout_file(folder, 1)) == groups


@pytest.mark.parametrize("surfaces_in", ["record", "flush", "end"])
def test_what_cannot_be_written_surfaces_at_the_next_step(saved, tmp_path, surfaces_in) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "rollouts").touch()
    recorder = RolloutRecorder(tmp_path / "full")
    recorder.record(1, saved[1])

    with pytest.raises(UserError, match="rollouts of step 1 could not be written to .*File exists"):
        {
            "record": lambda: recorder.record(2, saved[1]),
            "flush": recorder.flush,
            "end": lambda: recorder.__exit__(None, None, None),
        }[surfaces_in]()
