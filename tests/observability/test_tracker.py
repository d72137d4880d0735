"""The record files and TensorBoard scalars: what is written, repaired after a crash and forgotten on resume."""

import json
import logging
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.records import read_records
from megatron_dsrl.observability.tracker import Tracker
from tests.observability.synthetic_run import evaluation_record
from tests.support.disk import files_of_at_most


def small_record(step: int, reward: float = 0.5) -> dict:
    return {"step": step, "phase": "grpo", "reward/mean": reward}


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_records_are_on_disk_at_once_and_in_tensorboard(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log_evaluation(evaluation_record(0, accuracy=0.25))
    tracker.log_step(small_record(1, reward=0.5) | {"policy/grad_norm": torch.tensor(2.0)})

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close
    assert json.loads(lines[0]) == {"step": 1, "phase": "grpo", "reward/mean": 0.5, "policy/grad_norm": 2.0}
    assert read_records(tmp_path / "evaluation.jsonl") == [evaluation_record(0, accuracy=0.25)]
    tracker.close()
    assert scalars(tmp_path, "policy/grad_norm") == [(1, 2.0)]
    assert scalars(tmp_path, "evaluation/held-out/accuracy") == [(0, 0.25)]


def test_some_responses_of_every_evaluation(tmp_path: Path) -> None:
    """They are forgotten with their evaluation."""
    with Tracker(tmp_path, tensorboard=False) as tracker:
        for step in (0, 2):
            tracker.log_evaluation(evaluation_record(step, accuracy=0.5), [{"prompt": "1+1=?", "reward": 0.0}])
        tracker.truncate_after(1)
    assert read_records(tmp_path / "evaluation_responses.jsonl") == [
        {"step": 0, "set": "held-out", "responses": [{"prompt": "1+1=?", "reward": 0.0}]}
    ]


def test_tensorboard_shows_the_configuration(tmp_path: Path) -> None:
    """The one that holds now, where a resumed run has another."""
    for name in ("then", "now"):
        (tmp_path / "config.yaml").write_text(f"name: {name}\n")
        with Tracker(tmp_path) as tracker:
            tracker.truncate_after(tracker.last_step)
            tracker.log_step(small_record(tracker.last_step + 1) | {"time": 1.8e9})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert b"name: now" in events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0]


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """The error names the file; the records before survive, and the run continues behind them when there is space."""
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log_step(small_record(1))
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with files_of_at_most(size + 10), pytest.raises(UserError, match="metrics.jsonl could not be .* MiB are free"):
            tracker.log_step(small_record(2))
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 10
    with Tracker(tmp_path, tensorboard=False) as tracker:
        assert tracker.last_step == 1
        tracker.log_step(small_record(2))
    assert read_records(tmp_path / "metrics.jsonl") == [small_record(1), small_record(2)]


def test_a_disk_that_fills_up_under_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)  # its thread ends by the same error
    tracker = Tracker(tmp_path)
    with files_of_at_most(300), pytest.raises(UserError, match="tensorboard could not be written .* MiB are free"):
        for step in range(1, 30):
            tracker.log_evaluation({"step": step, "set": "x", "a": 1.0})
    with suppress(UserError):
        tracker.close()


def test_nan_and_infinity_become_null_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker, caplog.at_level(logging.WARNING):
        tracker.log_step(small_record(1) | {"policy/loss": float("nan"), "policy/grad_norm": float("inf")})
    assert read_records(tmp_path / "metrics.jsonl")[0]["policy/loss"] is None
    assert [record.getMessage() for record in caplog.records] == [
        "step 1: policy/loss is nan and is recorded as null",
        "step 1: policy/grad_norm is inf and is recorded as null",
    ]


@pytest.mark.parametrize("tail", ['{"step": 3, "phase": "gr', "\0\0\0\0", '{"step": 3, "phase": "x"}garbage\n'])
def test_a_half_written_last_line_is_removed_on_open(tmp_path: Path, tail: str) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log_step(small_record(1))
        tracker.log_step(small_record(2))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(tail)
    assert len(read_records(path)) == 2  # reading alone changes nothing
    assert path.read_text().endswith(tail)

    with Tracker(tmp_path, tensorboard=False) as tracker:
        assert tracker.last_step == 2
        tracker.log_step(small_record(3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_complete_last_line_without_line_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "phase": "grpo"}')
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log_step(small_record(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        Tracker(tmp_path, tensorboard=False)


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        for step in range(1, 6):
            tracker.log_step(small_record(step, reward=0.0))
            tracker.log_evaluation(evaluation_record(step, accuracy=0.5))

    with Tracker(tmp_path) as tracker:
        tracker.truncate_after(3)
        assert tracker.last_step == 3
        tracker.log_step(small_record(4, reward=1.0))

    assert [(r["step"], r["reward/mean"]) for r in read_records(tmp_path / "metrics.jsonl")] == [
        (1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0),
    ]  # fmt: skip
    assert [r["step"] for r in read_records(tmp_path / "evaluation.jsonl")] == [1, 2, 3]
    assert scalars(tmp_path, "reward/mean") == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0)]


def test_a_step_is_never_recorded_twice(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log_step(small_record(1))
        with pytest.raises(AssertionError, match="step 1 after step 1"):
            tracker.log_step(small_record(1))


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400", "1" + "0" * 400, "1" + "0" * 5000])
@pytest.mark.parametrize("after", ["", '\n{"step": 2}\n'])
def test_a_number_that_no_float_can_hold_is_named(tmp_path: Path, number: str, after: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "reward/mean": {number}}}' + after)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: the number [-\w.]{,24} cannot be read\. Replace it"):
        read_records(path)
