"""`dsrl analyse behaviours` with a judge that a real SGLang server serves.

Random weights judge nothing: the test shows that questions arrive, answers come back, and unreadable ones are counted.
"""

import json

import pytest

from megatron_dsrl.cli import main
from tests.observability.synthetic_run import write_run
from tests.support.judge import judge


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_asks_a_server_of_sglang(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    write_run(run, steps=2, warmup=1)

    with judge(tmp_path / "judge") as url:
        assert main(["analyse", "behaviours", str(run), "--url", url, "--judge", "default", "--responses", "2"]) == 0

    verdicts = [json.loads(line) for line in (run / "analysis" / "behaviours.jsonl").read_text().splitlines()]
    assert sorted(verdict["step"] for verdict in verdicts if "step" in verdict) == [1, 1, 2, 2]
    summary = json.loads((run / "analysis" / "behaviours.json").read_text())
    assert (summary["responses"], summary["unreadable_answers"], summary["questions_without_answer"]) == (4, 4, 0)
    assert (run / "analysis" / "behaviours.svg").exists()
    assert "unreadable answers: 4" in capsys.readouterr().out
