"""What `benchmark_against_trl.py` trains on: the tiny task, or a random model on a task that it learns quickly."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_dsrl.config.load import load_config
from megatron_dsrl.data.prompts import load_prompts
from megatron_dsrl.data.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
HOURS = 3600.0
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
RANDOM_MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}
CHAT_TEMPLATE = "{%- for message in messages -%}{{- message.content + ' ' -}}{%- endfor -%}"


@dataclass(frozen=True)
class Task:
    """What both train on."""

    reward: str
    """Name of a function of benchmark_rewards.py."""
    prompts: int
    response_tokens: int
    learning_rate: float
    trl_micro_batch: int
    """Samples per forward and backward pass of TRL; not tuned, `--trl-micro-batch` tries other sizes."""
    overrides: dict[str, Any]
    """Sections of the tiny task's configuration that change."""
    samples_per_prompt: int = 8


TASKS = {
    "tiny": Task("boxed_number", 32, 64, 2e-4, 256, {}),
    "random": Task(
        "even_first_word",
        prompts=4,
        response_tokens=128,
        learning_rate=1e-5,
        trl_micro_batch=16,
        overrides={
            "actor": {"max_tokens_per_micro_batch": 2304},
            "rollout": {"prompts_per_step": 4, "max_response_tokens": 128, "step_timeout_seconds": 3600.0},
        },
    ),
}


def write_random_task(folder: Path, architecture: dict[str, Any] = RANDOM_MODEL) -> dict[str, Any]:
    """Write a model with random weights and problems; returns overrides of the configuration."""
    torch.manual_seed(0)
    model = folder / "random_qwen3"
    Qwen3ForCausalLM(Qwen3Config(**architecture)).save_pretrained(model)
    words = architecture["vocab_size"] - len(SPECIAL_TOKENS)
    _write_tokenizer(model, words)
    used = min(words, 1000)
    rows = [{"problem": " ".join(f"w{(7 * i + j) % used}" for j in range(16)), "answer": "even"} for i in range(512)]
    problems = folder / "random_problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": {"path": str(model)}, "data": {"source": str(problems)}}


def _write_tokenizer(folder: Path, count: int) -> None:
    """A tokenizer of the words `w0`, `w1`, ..., with Qwen3's special tokens."""
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(count))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        extra_special_tokens=[SPECIAL_TOKENS[2]],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def write_configuration(folder: Path, task: Task, dtype: str, changes: dict[str, Any]) -> Path:
    """The tiny task's configuration for GRPO with what the task changes; nothing is evaluated or saved."""
    config: dict[str, Any] = {
        "inherits": [str(REPOSITORY / "configs/sizes/tiny.yaml"), str(REPOSITORY / "configs/methods/grpo.yaml")],
        "name": "benchmark",
        "steps": 10_000,
        "output_dir": str(folder / "runs"),
        "model": {"dtype": dtype},
        "reward": {"function": f"benchmark_rewards:{task.reward}"},
        "optimizer": {"learning_rate": task.learning_rate},
        # A suspended run must not consider its engine dead.
        "engine": {"health_timeout_seconds": 4 * HOURS, "health_check_seconds": HOURS},
        "evaluation": {"sets": [], "every_steps": None},
        "observability": {"save_rollouts": False},
    }
    for override in (task.overrides, changes):
        for section, values in override.items():
            config[section] = config.get(section, {}) | values
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_problems(config_file: Path, target: Path) -> None:
    """The prompts as text with their answers, for TRL."""
    config = load_config(config_file, [])
    prompts = load_prompts(config.data, load_tokenizer(config.model.path))
    target.write_text("".join(json.dumps({"prompt": p.text, "answer": p.answer}) + "\n" for p in prompts))
