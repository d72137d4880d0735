"""The samples of an evaluation judged again by another verifier: the same samples, other figures."""

from pathlib import Path

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.evaluation.metrics import summarise_benchmark
from megatron_dsrl.evaluation.rescore import rescore
from megatron_dsrl.evaluation.results import read_results, write_results
from megatron_dsrl.evaluation.sample_file import (
    ProblemResult,
    SampleFile,
    SampleResult,
    read_sample_file,
    read_settings,
)
from megatron_dsrl.rewards.boxed import boxed_answer
from tests.support.disk import files_of_at_most

TEXTS = [r"\boxed{1,234}", r"\boxed{1234}"]
"""Equal numbers in two spellings; only `math_verify` takes the second for the answer."""


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    samples = tuple(SampleResult(text, 10, False, 1.0, "ok") for text in TEXTS)
    problem = ProblemResult(0, "?", "1234", samples)
    settings = {"model": "m", "benchmark": {"samples_per_prompt": 2, "reward": {"function": "math_verify"}}}
    with SampleFile(tmp_path / "ours" / "samples" / "sums.jsonl", settings) as file:
        file.add(problem)
    summary = {"title": "Sums", "temperature": 1.0, **summarise_benchmark([problem], boxed_answer)}
    write_results(tmp_path / "ours", "models/mine", {"sums": summary}, step=7)
    return tmp_path / "ours"


def test_other_verdicts_on_the_same_samples(evaluation, tmp_path) -> None:
    theirs = tmp_path / "theirs"
    rescore(evaluation, theirs, RewardConfig(function="hendrycks", workers=1))

    before, after = read_results(evaluation), read_results(theirs)
    assert (before.benchmarks["sums"]["accuracy"], after.benchmarks["sums"]["accuracy"]) == (1.0, 0.5)
    assert (after.model, after.step, after.benchmarks["sums"]["temperature"]) == ("models/mine", 7, 1.0)
    (problem,) = read_sample_file(theirs / "samples" / "sums.jsonl")
    assert [(sample.text, sample.reward) for sample in problem.samples] == list(zip(TEXTS, [0.0, 1.0]))
    assert read_settings(theirs / "samples" / "sums.jsonl")["benchmark"]["reward"]["function"] == "hendrycks"


def test_after_a_full_disk_the_same_command_starts_over(evaluation, tmp_path) -> None:
    theirs = tmp_path / "theirs"
    with files_of_at_most(300), pytest.raises(UserError, match=r"sums.jsonl could not be written .*free space"):
        rescore(evaluation, theirs, RewardConfig(function="hendrycks", workers=1))
    assert rescore(evaluation, theirs, RewardConfig(function="hendrycks", workers=1))["sums"]["accuracy"] == 0.5


def test_a_verifier_that_does_not_exist_is_named_by_its_option(evaluation, tmp_path, capsys) -> None:
    assert main(["rescore", str(evaluation), "--verifier", "boxd", "--output", str(tmp_path / "theirs")]) == 2
    assert "--verifier: unknown verifier 'boxd'" in capsys.readouterr().err


def test_nothing_is_overwritten(evaluation) -> None:
    with pytest.raises(UserError, match="is not empty; choose another folder with --output"):
        rescore(evaluation, evaluation, RewardConfig(function="hendrycks"))
