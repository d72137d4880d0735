"""What a command prints while something takes long."""

import time

import pytest

from megatron_dsrl.common import waiting as module
from megatron_dsrl.common.waiting import waiting


def test_a_long_wait_is_announced_remembered_and_closed(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "SHORT_SECONDS", 0.0)
    with waiting("starting 1 engine", "usually 15 s", said.append, reminder_seconds=0.01):
        while len(said) < 2:
            time.sleep(0.001)
    assert said[0] == "starting 1 engine (usually 15 s) ..."
    assert said[1] == "starting 1 engine: not done after 0 s ..."
    assert said[-1] == "starting 1 engine: done after 0 s"
    count = len(said)
    time.sleep(0.03)
    assert len(said) == count, "no reminder after the end"


def test_a_short_wait_is_one_line_and_a_failed_one_is_not_done() -> None:
    said: list[str] = []
    with waiting("building the model", say=said.append):
        pass
    with pytest.raises(ValueError), waiting("reading", say=said.append):
        raise ValueError
    assert said == ["building the model ...", "reading ..."]


def test_only_the_first_of_torchruns_processes_speaks(monkeypatch, capsys) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with waiting(f"rank {rank}"):
            pass
    assert capsys.readouterr().out == "rank 0 ...\n"
