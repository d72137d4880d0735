"""Figures of a benchmark, and the files that hold them."""

import json

import pytest

from megatron_dsrl.evaluation.metrics import powers_of_two, summarise_benchmark
from megatron_dsrl.evaluation.published import SIX_BENCHMARKS
from megatron_dsrl.evaluation.results import markdown, read_results, write_results
from megatron_dsrl.evaluation.sample_file import ProblemResult, SampleResult
from megatron_dsrl.rewards.boxed import boxed_answer


def problem(index: int, rewards: list[float], texts: list[str] | None = None, **changes) -> ProblemResult:
    texts = texts or [rf"\boxed{{{reward:g}}}" for reward in rewards]
    defaults = {"tokens": 10, "truncated": False, "verdict": "ok"} | changes
    samples = tuple(SampleResult(text=text, reward=reward, **defaults) for text, reward in zip(texts, rewards))
    return ProblemResult(index, "?", "1", samples)


PROBLEMS = [
    problem(0, [1.0, 1.0, 0.0, 0.0], [r"\boxed{7}", r"\boxed{07}", r"\boxed{8}", "none"]),  # the vote is right
    problem(1, [0.0, 0.0, 0.0, 1.0], [r"\boxed{5}", r"\boxed{5}", "none", r"\boxed{6}"]),  # the vote is wrong
    problem(2, [0.0] * 4, tokens=50, truncated=True, verdict="timeout"),
]


def test_figures_against_values_worked_by_hand() -> None:
    summary = summarise_benchmark(PROBLEMS, boxed_answer)
    assert summary["accuracy"] == pytest.approx((0.5 + 0.25 + 0) / 3)
    # Pass@2: 1 - C(2,2)/C(4,2) = 5/6; 1 - C(3,2)/C(4,2) = 1/2; 0
    assert summary["pass_at_k"] == pytest.approx({1: 0.25, 2: (5 / 6 + 1 / 2) / 3, 4: 2 / 3})
    assert summary["majority_at_k"] == pytest.approx(1 / 3)
    assert (summary["mean_tokens"], summary["median_tokens"]) == (pytest.approx(70 / 3), 10)
    assert summary["truncated_fraction"] == pytest.approx(1 / 3)
    assert (summary["verifier_timeouts"], summary["verifier_errors"]) == (4, 0)
    low, high = summary["confidence_interval_95"]
    assert low == 0.0 and high == 0.5  # three problems: all draws of the worst, or of the best, are likely enough


def test_answers_that_cannot_be_compared_have_no_majority() -> None:
    assert summarise_benchmark(PROBLEMS, None)["majority_at_k"] is None


def test_powers_of_two() -> None:
    assert [powers_of_two(k) for k in (1, 2, 6, 32)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32]]


def test_files(tmp_path) -> None:
    summary = {"title": "Sums", **summarise_benchmark(PROBLEMS, boxed_answer)}
    write_results(tmp_path, "models/mine", {"sums": summary})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["benchmarks"]["sums"]["pass_at_k"]["4"] == pytest.approx(2 / 3)
    assert written["average_of_six"] is None
    row = next(line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| Sums"))
    assert row == "| Sums | 3 | 4 | 25.0 | 0.0 to 50.0 | 66.7 | 33.3 | 23 | 33.3 % | 4 |"
    assert "Sums" in (tmp_path / "pass_at_k.svg").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "pass_at_k.svg"}


def test_a_second_evaluation_of_the_same_model_adds_to_the_first(tmp_path) -> None:
    summary = {"title": "Sums", **summarise_benchmark(PROBLEMS, boxed_answer)}
    write_results(tmp_path, "mine", {"sums": summary}, step=5)
    write_results(tmp_path, "mine", {"products": summary | {"title": "Products"}}, step=5)
    assert list(read_results(tmp_path).benchmarks) == ["sums", "products"]
    write_results(tmp_path, "mine", {"sums": summary}, step=6)
    assert list(read_results(tmp_path).benchmarks) == ["sums"], "those were another policy"


def test_the_average_is_shown_beside_the_papers_only_if_all_six_are_there() -> None:
    summary = {"title": "T", **summarise_benchmark(PROBLEMS, boxed_answer)}
    six = {name: summary for name in SIX_BENCHMARKS}
    assert "| Qwen3-4B | 41.26 | 55.79 | 54.38 | 57.54 | 25.00 |" in markdown("mine", six)
    del six["amc23"]
    assert "| Qwen3-4B | 41.26 | 55.79 | 54.38 | 57.54 |  |" in markdown("mine", six)
    assert "paper" not in markdown("mine", {"sums": summary})
