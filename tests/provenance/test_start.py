"""A start is recorded with what it ran on; what cannot be found out or written never ends the command."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.records import PROVENANCE_FILE, read_starts
from megatron_dsrl.provenance.differences import steps_of_starts
from megatron_dsrl.provenance.start import processor_name, record_start, slurm_job


def fail(message: str) -> None:
    pytest.fail(message)


def test_every_start_adds_a_record_of_the_machine_and_the_command(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for step in (0, 8):
        record_start(tmp_path, "train", {"after_step": lambda: step}, fail)
    first, second = read_starts(tmp_path)
    assert (first["after_step"], second["after_step"]) == (0, 8)
    assert first["command_line"] == sys.orig_argv and first["working_folder"] == os.getcwd()
    assert first["hosts"] == [socket.gethostname()] and first["world_size"] == 1
    assert first["slurm"]["job_id"] == "17" and first["slurm"]["restart_count"] == "2"
    assert first["utc"].endswith("Z") and first["time"] <= second["time"]
    assert first["packages"]["torch"] and first["packages"]["sglang"]
    assert first["device"]["platform"] in ("cpu", "cuda") and first["device"]["processor"]
    assert first["code"]["commit"] or first["code"]["reason"]


def test_what_cannot_be_found_out_is_named_in_the_record(tmp_path: Path) -> None:
    record_start(tmp_path, "eval", {"model": lambda: (tmp_path / "gone").read_text()}, fail)
    assert read_starts(tmp_path)[0]["model"]["unknown"].startswith("FileNotFoundError: ")


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / PROVENANCE_FILE).write_text("not JSON\n{}\n")
    for folder, why in ((tmp_path / "gone", "No such file"), (tmp_path / "damaged", "line 1: not a JSON object")):
        warnings: list[str] = []
        record_start(folder, "train", {}, warnings.append)
        assert len(warnings) == 1 and PROVENANCE_FILE in warnings[0] and why in warnings[0]


def test_a_half_written_record_of_a_killed_start_is_replaced(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE_FILE).write_text('{"command": "train"}\n{"comm')
    record_start(tmp_path, "train", {}, fail)
    assert [start["command"] for start in read_starts(tmp_path)] == ["train", "train"]


def test_outside_slurm_there_is_no_job(tmp_path: Path) -> None:
    assert slurm_job({"PATH": "/bin"}) is None
    assert slurm_job({"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CONF": "/etc"}) == {
        "job_id": "7",
        "array_task_id": "3",
    }


def test_a_processor_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654: 96 cores\nmodel name\t: other\n")
    assert processor_name(tmp_path / "cpuinfo") == "AMD EPYC 9654: 96 cores"
    assert processor_name(tmp_path / "absent") == os.uname().machine


@pytest.mark.parametrize(
    ("after", "last_step", "spans"),
    [
        ([0], 10, [(1, 10)]),
        ([0, 4], 10, [(1, 4), (5, 10)]),
        ([0, 4, 4], 10, [(1, 4), None, (5, 10)]),
        ([0, 6, 4], 10, [(1, 4), None, (5, 10)]),
        ([0, 0], 10, [None, (1, 10)]),
        ([0, 8], 8, [(1, 8), None]),
    ],
    ids=["one", "continued", "died at once", "an older checkpoint", "from the beginning again", "no step yet"],
)
def test_which_steps_of_a_run_came_from_which_start(after, last_step, spans) -> None:
    assert steps_of_starts([{"after_step": step} for step in after], last_step) == spans


def test_a_damaged_file_is_the_users_to_know(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE_FILE).write_text("not JSON\n" + json.dumps({"command": "train"}) + "\n")
    with pytest.raises(UserError, match="provenance.jsonl, line 1"):
        read_starts(tmp_path)
