"""Benchmarks by declaration: built-in ones and custom ones."""

import json
from pathlib import Path

import pytest

from examples.tiny_dsrl.tokenizer import build_tokenizer
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.benchmark import benchmark_names, load_benchmark
from megatron_dsrl.data.prompts import load_prompts
from megatron_dsrl.rewards.registry import check_options

OWN = """
title: Sums
reward: {function: boxed}
samples_per_prompt: 4
file: {source: sums/*.jsonl, problem_field: sum}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sums.yaml").write_text(OWN)
    (tmp_path / "data" / "sums").mkdir(parents=True)
    (tmp_path / "data" / "sums" / "easy.jsonl").write_text(json.dumps({"sum": "1+1", "answer": 2}) + "\n")
    return tmp_path


def test_the_papers_benchmarks_are_there_and_well_formed() -> None:
    assert benchmark_names() == [
        "aime24", "aime25", "amc23", "bbh", "gpqa_diamond", "humaneval", "math500", "minerva", "mmlu_pro",
        "olympiadbench",
    ]  # fmt: skip
    for name in benchmark_names():
        benchmark = load_benchmark(name, data_folder=None)
        assert benchmark.name == name and "/" in benchmark.config.source
        if benchmark.config.reward.function != "code":  # which also asks whether this machine can isolate programs
            check_options(benchmark.config.reward.function, benchmark.config.reward.options)


def test_own_benchmark(folder) -> None:
    benchmark = load_benchmark(str(folder / "sums.yaml"), folder / "data", {"temperature": 0.5})
    assert (benchmark.name, benchmark.config.title, benchmark.config.samples_per_prompt) == ("sums", "Sums", 4)
    assert benchmark.config.temperature == 0.5
    [prompt] = load_prompts(benchmark.config, build_tokenizer())
    assert prompt.answer == "2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "math5000"}, "unknown benchmark `math5000`; choose one of aime24, "),
        ({"name": "nowhere.yaml"}, "cannot read nowhere.yaml: No such file or directory"),
        ({"name": "nowhere.yml"}, "cannot read nowhere.yml: "),
        ({"changes": {"source": None}}, "source: expected a string, got None"),
        ({"data_folder": None}, "has no section `hub`; set --data-folder"),
        ({"data_folder": "elsewhere"}, r"sums/\*.jsonl is not in elsewhere"),
        ({"changes": {"temperature": -1.0}}, r"expected greater than or equal to 0, got -1.0 \(command line"),
        ({"changes": {"tempratur": 1.0}}, r"tempratur: unknown key; did you mean temperature\? \(command line\)"),
    ],
)
def test_mistakes(folder, change, message) -> None:
    from pathlib import Path

    arguments = {"name": str(folder / "sums.yaml"), "data_folder": folder / "data", **change}
    if isinstance(arguments["data_folder"], str):
        arguments["data_folder"] = Path(arguments["data_folder"])
    with pytest.raises(UserError, match=message):
        load_benchmark(**arguments)
