"""Samples on disk: what is written is there at once, and an evaluation continues only as the same one."""

import json

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.evaluation.sample_file import ProblemResult, SampleFile, SampleResult, read_sample_file
from tests.support.disk import files_of_at_most

SETTINGS = {"model": "abc", "benchmark": {"temperature": 1.0}}


def sample(tokens: int) -> SampleResult:
    return SampleResult("line one\nline two\u2028\r end é", tokens, truncated=False, reward=1.0, verdict="ok")


def problem(index: int, first: int = 0) -> ProblemResult:
    """With one sample, of this number and of 7 tokens more."""
    return ProblemResult(index, prompt="1+1", answer="2", samples=(sample(7 + first),), first=first)


def test_what_was_added_is_there_before_the_file_is_closed(tmp_path) -> None:
    path = tmp_path / "samples" / "sums.jsonl"
    first = SampleFile(path, SETTINGS)
    first.add(problem(3))
    with SampleFile(path, SETTINGS) as second:
        assert second.problems == {3: problem(3)}
        second.add(problem(1))
    first.close()
    with SampleFile(path, SETTINGS) as third:
        assert third.problems == {3: problem(3), 1: problem(1)}


def test_samples_of_a_problem_come_in_any_order_and_are_read_in_that_of_their_numbers(tmp_path) -> None:
    path = tmp_path / "sums.jsonl"
    settings = {"benchmark": {"samples_per_prompt": 3}}
    with SampleFile(path, settings) as file:
        for index, number in [(0, 2), (1, 1), (0, 0)]:
            file.add(problem(index, number))
    with pytest.raises(UserError, match="has no finished problem yet"):
        read_sample_file(path)
    with SampleFile(path, settings) as file:
        assert (file.numbers(0), file.numbers(1), file.numbers(2)) == ({0, 2}, {1}, set())
        file.add(problem(0, 1))
    assert [[s.tokens for s in p.samples] for p in read_sample_file(path)] == [[7, 8, 9]]


def test_a_half_written_sample_is_drawn_again(tmp_path) -> None:
    path = tmp_path / "sums.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.add(problem(0))
        file.add(problem(1))
    path.write_bytes(path.read_bytes()[:-20])
    with SampleFile(path, SETTINGS) as file:
        assert list(file.problems) == [0]
        file.add(problem(1))
    with SampleFile(path, SETTINGS) as file:
        assert list(file.problems) == [0, 1]


def test_a_full_disk_is_one_message_and_leaves_what_was_there(tmp_path) -> None:
    path = tmp_path / "sums.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.add(problem(0))
    message = rf"{path} could not be written .* No finished sample is lost; free space"
    with files_of_at_most(path.stat().st_size + 20), pytest.raises(UserError, match=message) as raised:
        with SampleFile(path, SETTINGS) as file:
            file.add(problem(1))
    assert isinstance(raised.value.__cause__, OSError) and raised.value.__context__ is raised.value.__cause__
    with SampleFile(path, SETTINGS) as file:
        assert list(file.problems) == [0]


def test_other_settings_are_refused_and_named(tmp_path) -> None:
    path = tmp_path / "sums.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.add(problem(0))
    with pytest.raises(UserError, match="made with other settings .*benchmark: .*'temperature': 1.0.* then, .*0.5"):
        SampleFile(path, {**SETTINGS, "benchmark": {"temperature": 0.5}})
    with pytest.raises(UserError, match="seed: None then, 2 now.*--output"):
        SampleFile(path, {**SETTINGS, "seed": 2})


def test_an_evaluation_that_ended_before_its_first_sample_decides_nothing(tmp_path) -> None:
    path = tmp_path / "sums.jsonl"
    SampleFile(path, SETTINGS).close()
    with SampleFile(path, SETTINGS | {"seed": 2}) as file:
        file.add(problem(0))
    assert json.loads(path.read_text().splitlines()[0])["seed"] == 2


def test_something_else_is_refused(tmp_path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"model": "abc", "benchmark": {"temperature": 1.0}}\n{"index": 1}\n')
    with pytest.raises(UserError, match="a line is not a valid sample"):
        SampleFile(path, SETTINGS)
