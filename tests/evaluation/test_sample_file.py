"""Samples on disk: what is written is there at once, and an evaluation continues only as the same one."""

import pytest

from megatron_dsrl.errors import UserError
from megatron_dsrl.evaluation.problem_result import ProblemResult, SampleResult
from megatron_dsrl.evaluation.sample_file import SampleFile

SETTINGS = {"model": "abc", "benchmark": {"temperature": 1.0}}


def problem(index: int) -> ProblemResult:
    sample = SampleResult("line one\nline two\u2028\r end é", tokens=7, truncated=False, reward=1.0, verdict="ok")
    return ProblemResult(index, prompt="1+1", answer="2", samples=(sample,))


def test_what_was_added_is_there_before_the_file_is_closed(tmp_path):
    path = tmp_path / "samples" / "sums.jsonl"
    first = SampleFile(path, SETTINGS)
    first.add(problem(3))
    with SampleFile(path, SETTINGS) as second:
        assert second.done == {3: problem(3)}
        second.add(problem(1))
    first.close()
    with SampleFile(path, SETTINGS) as third:
        assert third.done == {3: problem(3), 1: problem(1)}


def test_a_half_written_problem_is_done_again(tmp_path):
    path = tmp_path / "sums.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.add(problem(0))
        file.add(problem(1))
    path.write_bytes(path.read_bytes()[:-20])
    with SampleFile(path, SETTINGS) as file:
        assert list(file.done) == [0]
        file.add(problem(1))
    with SampleFile(path, SETTINGS) as file:
        assert list(file.done) == [0, 1]


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "sums.jsonl"
    SampleFile(path, SETTINGS).close()
    with pytest.raises(UserError, match="made with other settings .*benchmark: .*'temperature': 1.0.* then, .*0.5"):
        SampleFile(path, {**SETTINGS, "benchmark": {"temperature": 0.5}})
    with pytest.raises(UserError, match="seed: None then, 2 now.*--output"):
        SampleFile(path, {**SETTINGS, "seed": 2})


def test_something_else_is_refused(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"model": "abc", "benchmark": {"temperature": 1.0}}\n{"index": 1}\n')
    with pytest.raises(UserError, match="a line is no finished problem"):
        SampleFile(path, SETTINGS)
