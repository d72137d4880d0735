"""Trackers of a training: what they receive, over resumptions too, and that their failures leave the training alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.observability.trackers import process
from megatron_dsrl.observability.trackers.base import TrackerOptions
from megatron_dsrl.observability.trackers.launch import Trackers
from megatron_dsrl.run.preemption import Preempted
from tests.support.recording_tracker import RecordingTracker, calls

CONFIG = """\
name: counted
steps: 6
seed: 3
phases:
- {name: warm-up, until_step: 2}
- {name: grpo, until_step: null}
"""
RESPONSE = {"problem": 0, "prompt": "1+1=?", "response": "\\boxed{2}", "answer": "2", "reward": 1.0, "tokens": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "counted"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def tracker_at(file: Path, **options: object) -> RecordingTracker:
    return RecordingTracker(name="tests.support.recording_tracker:RecordingTracker", file=str(file), **options)


def train(
    folder: Path,
    trackers: Sequence[TrackerOptions],
    steps: range,
    error: BaseException | None = None,
    between: Callable[[int, list[str]], None] = lambda step, reported: None,
) -> list[str]:
    """Record these steps as a training does, the run being resumed before the first; returns the reported lines."""
    reported: list[str] = []
    with Trackers(trackers, folder, reported.append) as running, Tracker(folder, tensorboard=False) as records:
        records.truncate_after(steps.start - 1)
        running.start()
        for step in steps:
            records.log_step({"step": step, "phase": "grpo", "reward/mean": step / 10, "policy/loss": None})
            if step % 2 == 0:
                records.log_evaluation({"step": step, "set": "sums", "accuracy": 0.5}, [RESPONSE])
            between(step, reported)
        if error is not None:
            raise error
    return reported


def test_a_resumed_run_continues_in_the_same_tracker_run(folder: Path, tmp_path: Path) -> None:
    """Steps that are taken again after the checkpoint of step 3 are not sent again."""
    file = tmp_path / "calls.jsonl"
    with pytest.raises(Preempted):
        train(folder, [tracker_at(file)], range(1, 5), Preempted())
    reported = train(folder, [tracker_at(file)], range(4, 7))

    assert reported == ["tracker tests.support.recording_tracker:RecordingTracker: http://tracker/run"]
    first, second = calls(file, "open")
    assert first["id"] == second["id"] and first["name"] == "counted" and first["process"] == os.getpid()
    assert first["config"]["seed"] == 3
    assert first["config"]["phase_schedule"] == [
        {"name": "warm-up", "first_step": 1, "last_step": 2},
        {"name": "grpo", "first_step": 3, "last_step": 6},
    ]
    assert [(call["step"], call["metrics"]) for call in calls(file, "log")] == [
        (1, {"reward/mean": 0.1}),
        (2, {"reward/mean": 0.2}),
        (2, {"evaluation/sums/accuracy": 0.5}),
        (3, {"reward/mean": 0.3}),
        (4, {"reward/mean": 0.4}),
        (4, {"evaluation/sums/accuracy": 0.5}),
        (5, {"reward/mean": 0.5}),
        (6, {"reward/mean": 0.6}),
        (6, {"evaluation/sums/accuracy": 0.5}),
    ]
    assert [call["status"] for call in calls(file, "finish")] == ["interrupted", "finished"]
    responses = calls(file, "responses")
    assert [call["step"] for call in responses] == [2, 4, 6]
    assert responses[0]["set"] == "sums" and responses[0]["rows"] == [["1+1=?", "\\boxed{2}", "2", 1.0]]


def test_a_training_that_is_killed(folder: Path, tmp_path: Path) -> None:
    """What it has recorded still arrives, and the next start waits for that and continues in the same tracker run."""
    file = tmp_path / "calls.jsonl"
    program = (
        "import os, signal, time\nfrom pathlib import Path\n"
        "from tests.observability.trackers.test_launch import tracker_at, train\n"
        f"file = Path({str(file)!r})\n"
        "def kill(step, reported):\n"
        "    while step == 4 and not file.exists(): time.sleep(0.05)\n"
        "    if step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train(Path({str(folder)!r}), [tracker_at(file)], range(1, 5), between=kill)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    train(folder, [tracker_at(file)], range(3, 7))
    assert [call["step"] for call in calls(file, "log") if "reward/mean" in call["metrics"]] == [1, 2, 3, 4, 5, 6]
    assert [call["status"] for call in calls(file, "finish")] == ["interrupted", "finished"]
    assert len({call["id"] for call in calls(file, "open")}) == 1


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("open_fails", "failed (ConnectionError: no route to the tracker); the run continues, see "),
        ("crashes", "ended unexpectedly (status 7); the run continues, see "),
    ],
)
def test_a_tracker_that_fails_is_reported_once_and_the_run_continues(folder, tmp_path, trouble, said) -> None:
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    started = time.monotonic()

    def wait_for_report(step: int, reported: list[str]) -> None:
        while step == 3 and not any(said in line for line in reported) and time.monotonic() < started + 60:
            time.sleep(0.05)

    reported = train(folder, [tracker_at(bad, trouble=trouble), tracker_at(good)], range(1, 7), between=wait_for_report)
    warnings = [line for line in reported if line.startswith("warning")]
    assert said in warnings[0]
    assert [line for line in warnings[1:] if "has not received everything" not in line] == []
    assert f"`dsrl upload {folder} --to tests.support" in warnings[-1]
    assert [call["step"] for call in calls(good, "log")] == [1, 2, 2, 3, 4, 4, 5, 6, 6] and not bad.exists()
    logs = "".join(log.read_text() for log in (folder / "trackers").glob("*.log"))
    assert ("Traceback" in logs and "no route to the tracker" in logs) == (trouble == "open_fails")


def test_a_tracker_that_hangs_slows_neither_the_steps_nor_the_end(folder: Path, tmp_path: Path) -> None:
    hanging = tracker_at(tmp_path / "calls.jsonl", trouble="hangs", finish_seconds=1.0)
    started = time.monotonic()
    reported = train(folder, [hanging], range(1, 7))
    assert time.monotonic() - started < 60  # it would hang for an hour
    (line,) = reported
    assert line.startswith("warning: tracker tests.support") and "has not received everything; `dsrl upload" in line


def test_a_call_that_failed_is_repeated_without_loss(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "calls.jsonl"
    url, failed, sent = train(folder, [tracker_at(file, trouble="second_step_fails_once")], range(1, 5))
    assert [call["step"] for call in calls(file, "log")] == [1, 2, 2, 3, 4, 4]
    assert url.endswith(": http://tracker/run")
    assert "failed (TimeoutError: the tracker is busy); the run continues, see" in failed
    assert sent.endswith("has now received everything")


def test_slow_calls_are_reported_once(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(process, "SLOW_CALL_SECONDS", 0.01)
    messages = process.Messages(sys.stdout, tracker_at(tmp_path / "calls.jsonl"), tmp_path)
    for _ in range(2):
        with messages.slow_calls_reported():
            time.sleep(0.3)
    (line,) = capsys.readouterr().out.splitlines()
    assert "has not answered for 0.01 s; the run continues, see" in line


def test_other_ranks_have_no_trackers(folder: Path, tmp_path: Path) -> None:
    """They never call `start`."""
    with Trackers([tracker_at(tmp_path / "calls.jsonl")], folder, pytest.fail):
        pass
    assert not (tmp_path / "calls.jsonl").exists() and not (folder / "trackers").exists()


def test_what_produced_the_run_is_in_its_configuration(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "calls.jsonl"
    (folder / "provenance.jsonl").write_text('{"commit": "a"}\n' + json.dumps({"commit": "b"}) + "\n")
    train(folder, [tracker_at(file)], range(1, 2))
    assert calls(file, "open")[0]["config"]["provenance"] == {"commit": "b"}
