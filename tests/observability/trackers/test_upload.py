"""`dsrl upload`: replays a run folder, and continues where it stopped."""

from contextlib import closing
from pathlib import Path

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.observability.trackers.cursor import Cursor
from megatron_dsrl.observability.trackers.upload import chosen_trackers, upload
from tests.support.recording_tracker import PATH, calls

CONFIG = "name: sent\nsteps: 4\nphases:\n- {name: grpo}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "sent"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    record_steps(folder, 1, 2)
    return folder


def record_steps(folder: Path, *steps: int) -> None:
    with Tracker(folder, tensorboard=False) as records:
        for step in steps:
            records.log_step({"step": step, "phase": "grpo", "reward/mean": 0.5})
            records.log_evaluation({"step": step, "set": "sums", "accuracy": 0.5}, [{"prompt": "?", "reward": 0.0}])


def test_a_second_upload_sends_only_what_is_new(folder: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "calls.jsonl"
    command = ["upload", str(folder), "--to", PATH, f"file={file}"]
    assert main(command) == 0
    assert main(command) == 0
    record_steps(folder, 3, 4)
    assert main(command) == 0
    run_id = calls(file, "open")[0]["id"]
    assert capsys.readouterr().out.splitlines() == [
        f"{PATH}: sent 2 steps and 2 evaluations to run {run_id} at http://tracker/run",
        f"{PATH}: nothing new to send",
        f"{PATH}: sent 2 steps and 2 evaluations to run {run_id} at http://tracker/run",
    ]
    assert [(call["id"], call["process"]) for call in calls(file, "open")] == [(run_id, None)] * 2
    assert [call["step"] for call in calls(file, "log")] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [call["step"] for call in calls(file, "responses")] == [1, 2, 3, 4]
    assert [call["status"] for call in calls(file, "finish")] == ["running", "finished"]


def test_another_destination_receives_everything(folder: Path, tmp_path: Path) -> None:
    for file in (tmp_path / "here.jsonl", tmp_path / "there.jsonl"):
        (tracker,) = chosen_trackers(folder, [PATH], [f"file={file}"])
        upload(folder, tracker)
        assert [call["step"] for call in calls(file, "log")] == [1, 1, 2, 2]
        longer_end = chosen_trackers(folder, [PATH], [f"file={file}", "finish_seconds=5.0"])[0]
        assert upload(folder, longer_end) == f"{PATH}: nothing new to send"  # how, not where


def test_an_upload_that_failed_continues(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "calls.jsonl"
    (tracker,) = chosen_trackers(folder, [PATH], [f"file={file}", "trouble=second_step_fails_once"])
    with pytest.raises(UserError, match=r"failed \(TimeoutError: the tracker is busy\); run the same command again"):
        upload(folder, tracker)
    assert [call["step"] for call in calls(file, "log")] == [1, 1]
    (tracker,) = chosen_trackers(folder, [PATH], [f"file={file}", "trouble=none"])
    assert "sent 2 steps" in upload(folder, tracker)  # another destination, since its options differ


def test_options_are_those_of_the_run_unless_given(folder: Path) -> None:
    (folder / "config.yaml").write_text(
        CONFIG + "observability:\n  trackers:\n  - {name: trackio, project: mine}\n  - {name: mlflow, experiment: e}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_dsrl.observability.trackers.base.find_spec", lambda name: object())
        assert [tracker.name for tracker in chosen_trackers(folder, [], [])] == ["trackio", "mlflow"]
        (chosen,) = chosen_trackers(folder, ["trackio"], ["group=seeds"])
        assert (chosen.project, chosen.group) == ("mine", "seeds")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no observability.trackers; name one, such as --to wandb"),
        (["--to", "wanbd"], "--to wanbd: no such tracker; use one of "),
        (["--to", "wandb", "projekt=a"], "--to wandb: projekt: this tracker has no such option"),
        (["--to", "nowhere:Class"], "--to nowhere:Class: cannot import `nowhere`"),
    ],
)
def test_mistakes(folder: Path, arguments: list[str], message: str, capsys) -> None:
    assert main(["upload", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_it_does_not_interfere_with_a_training_that_sends(folder: Path, tmp_path: Path) -> None:
    (tracker,) = chosen_trackers(folder, [PATH], [f"file={tmp_path / 'calls.jsonl'}"])
    with closing(Cursor(folder, tracker)), pytest.raises(UserError, match="is being sent to .* by another process"):
        upload(folder, tracker)
    with closing(Cursor(folder, tracker)) as cursor:
        cursor.file.write_text("{}")
    with pytest.raises(UserError, match=r"json is damaged \(KeyError\('run_id'\)\); remove it"):
        upload(folder, tracker)
