"""`dsrl sft` as a user runs it: the real Megatron actor on prompt/response pairs, without an engine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dsrl.cli import main
from megatron_dsrl.commands.train import steps_of_epochs
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config
from megatron_dsrl.data.demonstrations import Demonstration, load_demonstrations
from megatron_dsrl.data.samplers import PromptSampler
from tests.support.compare_runs import assert_same_tensors, checkpoint_tensors, different_records, records
from tests.support.tiny_run import dsrl, write_tiny_run

STEPS, BATCH = 10, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """40 sums with worked solutions, all of them for training, 8 also as the held-out set."""
    folder = tmp_path_factory.mktemp("sft")
    file = write_tiny_run(folder)
    pairs = folder / "pairs.jsonl"
    with pairs.open("w") as stream:
        for line in (folder / "prompts.jsonl").read_text().splitlines():
            problem, answer = json.loads(line).values()
            stream.write(json.dumps({"problem": problem, "response": f"{problem[:-2]}\n={answer}"}) + "\n")
    rows = {"source": str(pairs), "system_prompt": None, "max_prompt_tokens": 64}
    run = yaml.safe_load(file.read_text()) | {
        "data": rows,
        "rollout": {"prompts_per_step": BATCH, "max_response_tokens": 24},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "decay": "cosine"},
        "phases": [{"name": "SFT", "space": "post_train", "advantage": "raw_reward", "loss": "supervised"}],
        "evaluation": {"every_steps": 5, "sets": [{"name": "held-out", "limit": 8, **rows}]},
        "checkpoint": {"save_every_steps": 5, "keep_last": 9},
    }
    file.write_text(yaml.safe_dump(run))
    return file


@pytest.fixture(scope="module")
def run(config) -> Path:
    """Two epochs."""
    result = dsrl("sft", str(config), "--epochs", "2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "every step: 8 responses of the data set, 2.00 epochs of 40 in all; 1 optimizer step of 8" in lines
    assert any(line.startswith("held-out: loss ") and " -> loss " in line for line in lines)
    return config.parent / "runs" / "tiny"


def demonstrations(config: Path, count: int | None = None) -> list[Demonstration]:
    tokenizer = AutoTokenizer.from_pretrained(config.parent / "model")
    return load_demonstrations(load_config(config, ["steps=1"]).data, tokenizer, 24)[:count]


@torch.no_grad()
def mean_cross_entropy(model: Path, rows: list[Demonstration]) -> float:
    """What Transformers computes with labels of -100 on the prompt: the mean over all response tokens."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses = []
    for row in rows:
        ids = torch.tensor([[*row.token_ids, *row.response_ids]])
        labels = ids.clone()
        labels[:, : len(row.token_ids)] = -100
        losses.append(loaded(ids, labels=labels).loss.item() * len(row.response_ids))
    return sum(losses) / sum(len(row.response_ids) for row in rows)


def test_the_loss_is_the_cross_entropy_of_transformers(config, run) -> None:
    rows = demonstrations(config)
    first = [rows[i] for i in PromptSampler(len(rows), seed=1).next(BATCH)]
    assert records(run)[0]["policy/loss"] == pytest.approx(mean_cross_entropy(config.parent / "model", first), rel=1e-5)
    for record, model in zip(records(run, "evaluation.jsonl")[::2], (config.parent / "model", run / "hf/step_000010")):
        assert record["loss"] == pytest.approx(mean_cross_entropy(model, rows[:8]), rel=1e-5)


def test_the_loss_falls_and_the_learning_rate_follows_its_schedule(run) -> None:
    steps, evaluations = records(run), records(run, "evaluation.jsonl")
    assert [record["step"] for record in evaluations] == [0, 5, 10]
    assert evaluations[0]["loss"] > evaluations[1]["loss"] > evaluations[2]["loss"]
    assert evaluations[2]["loss"] < 0.75 * evaluations[0]["loss"]
    assert 0 < evaluations[0]["loss_standard_error"] < 0.2 and evaluations[0]["responses"] == 8
    assert steps[-1]["data/epoch"] == 2.0
    rates = [record["policy/learning_rate"] for record in steps]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3]) and rates[2:] == sorted(rates[2:], reverse=True)


def test_a_record_has_nothing_of_engines_and_rewards(run) -> None:
    names = {name for record in records(run) for name in record}
    assert not any(name.startswith(("reward/", "mismatch/", "throughput/", "engine/")) for name in names)
    assert not (run / "engines").exists() and not (run / "rollouts").exists()
    card = ModelCard.load(run / "hf" / "step_000010" / "README.md").text
    assert "trained for 10 steps by supervised fine-tuning" in card and "Reward" not in card and "SGLang" not in card


def test_the_report_draws_the_losses(run) -> None:
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Loss on held-out responses" in page and "Loss on held-out" in page and "Verifier failures" not in page


def test_it_resumes_exactly(config, run) -> None:
    cut = run.parent / "cut"
    shutil.copytree(run, cut)
    for part in ("checkpoints/step_000010", "hf"):
        shutil.rmtree(cut / part)
    result = dsrl("sft", str(config), "--epochs", "2", "name=cut")
    assert result.returncode == 0 and "continuing after step 5" in result.stdout, result.stderr
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        assert different_records(file, records(run, file), records(cut, file)) == []
    assert_same_tensors(checkpoint_tensors(run, STEPS), checkpoint_tensors(cut, STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_every_layout_has_the_same_losses(config, run, layout) -> None:
    split = [] if layout == "data" else [f"parallel.{layout}_parallel_size=2"]
    result = dsrl("sft", str(config), "--epochs", "2", f"name={layout}", *split, processes=2)
    assert result.returncode == 0, result.stderr
    for file, key in (("metrics.jsonl", "policy/loss"), ("evaluation.jsonl", "loss")):
        one, two = ([record[key] for record in records(each, file)] for each in (run, run.parent / layout))
        assert two == pytest.approx(one, rel=1e-4)


def test_epochs_are_rounded_up_to_steps_and_need_rows_that_can_be_counted(config) -> None:
    assert steps_of_epochs([str(config)], [], 0.3) == 2  # 12 of 40 rows
    with pytest.raises(UserError, match="--epochs: the rows of data.source=openai/gsm8k are not counted"):
        steps_of_epochs([str(config)], ["data.source=openai/gsm8k"], 1)
