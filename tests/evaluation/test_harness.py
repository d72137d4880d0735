"""The harness proof: gold answers replayed through the whole evaluator are right, corrupted ones are wrong.

Prompting, dispatch, decoding, extraction, verifier, files and metrics are the real ones; only the engine is replaced by
prepared responses. The problems for which that does not hold are listed in `harness_exceptions.yaml`, each with the
reason.
"""

import shutil
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from megatron_dsrl.config.benchmark import load_benchmark
from megatron_dsrl.data.prompts import load_prompts
from megatron_dsrl.data.rows import read_rows
from megatron_dsrl.data.tokenizer import load_tokenizer, stop_token_ids
from megatron_dsrl.evaluation.benchmark_evaluator import evaluate_benchmark
from megatron_dsrl.evaluation.sample_file import read_sample_file
from megatron_dsrl.rewards.boxed import normalise
from tests.support.replayed_completions import ReplayingSampler

BENCHMARKS = [
    "math500", "amc23", "aime24", "aime25", "minerva", "olympiadbench", "gpqa_diamond", "mmlu_pro", "bbh", "humaneval",
]  # fmt: skip
EXCEPTIONS = yaml.safe_load(Path(__file__).with_name("harness_exceptions.yaml").read_text())
GPQA = Path(__file__).with_name("made_up_gpqa.csv")


def gold_response(name: str, row: dict, answer: str) -> str:
    """What a perfect model would write."""
    if name in ("math500", "minerva"):
        return row["solution"]
    if name == "bbh":
        return f"Let's see.\nSo the answer is {answer}."
    if name == "humaneval":
        return f"Sure:\n```python\n{row['prompt']}{row['canonical_solution']}```\nIt works."
    if name == "mmlu_pro":
        return f"The answer is ({answer})."
    return rf"Hence it is $\boxed{{{spelled_otherwise(answer)}}}$."


def spelled_otherwise(answer: str) -> str:
    """The same answer as a model might write it: other fractions, no padding, and several answers in reverse order."""
    answer = answer.replace("$", "")
    if answer.isdecimal():
        return str(int(answer))
    parts, depth = [""], 0
    for letter in answer:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return ", ".join(part.strip() for part in reversed(parts)).replace("\\frac", "\\dfrac")


def corrupted_response(name: str, row: dict, answers: list[str], index: int) -> str:
    """The same in form, but with the answer of another problem, another letter, or a function that does nothing."""
    if name == "humaneval":
        return f"```python\n{row['prompt']}    pass\n```"
    if name in ("mmlu_pro", "gpqa_diamond"):
        return rf"\boxed{{{'B' if answers[index] == 'A' else 'A'}}}"
    others = [*answers[index + 1 :], *answers[:index]]
    other = next(answer for answer in others if normalise(answer).lower() != normalise(answers[index]).lower())
    return gold_response("", {}, other) if name != "bbh" else gold_response("bbh", {}, other)


@pytest.fixture(scope="module")
def qwen3_tokenizer(data_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(data_folder / "qwen3-tokenizer"))


def replay(name: str, tokenizer, data_folder: Path, folder: Path, limit: int | None) -> tuple[list[list[float]], dict]:
    """Rewards of the gold and the corrupted response to every problem, and the figures."""
    if name == "gpqa_diamond":
        (folder / "gpqa").mkdir()
        shutil.copy(GPQA, folder / "gpqa" / "gpqa_diamond.csv")
        data_folder = folder
    benchmark = load_benchmark(name, data_folder, {"samples_per_prompt": 2, "limit": limit})
    rows = read_rows(benchmark.config, name)
    prompts = load_prompts(benchmark.config, tokenizer, name)
    answers = [prompt.answer for prompt in prompts]

    def responses(prompt) -> tuple[str, str]:
        row = rows[prompt.index]
        return gold_response(name, row, prompt.answer), corrupted_response(name, row, answers, prompt.index)

    file, stops = folder / "samples.jsonl", stop_token_ids(tokenizer, folder)
    summary = evaluate_benchmark(
        benchmark, prompts, ReplayingSampler(responses, tokenizer), stops, file, {"model": "replay"}
    )
    problems = sorted(read_sample_file(file), key=lambda problem: problem.index)
    return [[sample.reward for sample in problem.samples] for problem in problems], summary


def check(name: str, tokenizer, data_folder: Path, folder: Path, limit: int | None) -> None:
    rewards, summary = replay(name, tokenizer, data_folder, folder, limit)
    listed = EXCEPTIONS.get(name, {})
    wrong = {index for index, (gold, _) in enumerate(rewards) if gold != 1.0}
    right = {index for index, (_, corrupted) in enumerate(rewards) if corrupted != 0.0}
    expected = {kind: {index for index in listed.get(kind, {}) if index < len(rewards)} for kind in ("wrong", "right")}
    assert (wrong, right) == (expected["wrong"], expected["right"])
    assert summary["pass_at_k"][2] == 1 - len(wrong - right) / len(rewards)
    assert summary["verifier_errors"] == 0


@pytest.mark.needs_data
@pytest.mark.parametrize("name", BENCHMARKS)
def test_first_problems(name, qwen3_tokenizer, data_folder, tmp_path) -> None:
    check(name, qwen3_tokenizer, data_folder, tmp_path, limit=6)


@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_problems(name, qwen3_tokenizer, data_folder, tmp_path) -> None:
    check(name, qwen3_tokenizer, data_folder, tmp_path, limit=None)
