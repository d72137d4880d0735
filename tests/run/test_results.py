"""What a finished run says."""

import json
from pathlib import Path

from megatron_dsrl.run.results import closing_lines


def test_accuracy_before_and_after_the_folder_and_the_next_commands(tmp_path: Path) -> None:
    records = [
        {"step": 0, "set": "MATH", "accuracy": 0.205},
        {"step": 0, "set": "AIME", "accuracy": None},
        {"step": 5, "set": "MATH", "accuracy": 0.4},
        {"step": 9, "set": "MATH", "accuracy": 0.743},
        {"step": 9, "set": "new", "accuracy": 0.1},
    ]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    first, *rest = closing_lines(tmp_path, 9)
    assert first == f"{tmp_path} is complete: 9 steps"
    assert rest[:2] == ["MATH: 20.5% (step 0) -> 74.3% (step 9)", "new: 10.0% after step 9"]
    assert f"dsrl report {tmp_path} " in rest[2] and f"dsrl samples {tmp_path} " in rest[3]


def test_losses_before_and_after_of_a_run_that_sampled_nothing(tmp_path: Path) -> None:
    records = [{"step": step, "set": "chat", "loss": 2.0 / step} for step in (1, 4)]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    _, losses, *commands = closing_lines(tmp_path, 4)
    assert losses == "chat: loss 2.0000 (step 1) -> loss 0.5000 (step 4)"
    assert f"dsrl eval {tmp_path} " in commands[1]


def test_the_next_commands_can_be_copied_where_the_folder_has_a_space(tmp_path: Path) -> None:
    lines = closing_lines(tmp_path / "my run", 4)
    assert f"next: dsrl report '{tmp_path}/my run' " in lines[1]
