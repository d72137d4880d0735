"""A small run of sums over random weights, as files on disk: what `dsrl train` needs."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch
import yaml
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE, build_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


def write_tiny_run(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Model, prompts and a configuration of both phases under `folder`; returns the configuration file.

    Rewards are the parity of the response's length: random weights never solve a problem, and a reward that is
    always zero would train nothing.

    Args:
        folder: where.
        model: instead of a dense one; with `VOCAB_SIZE` tokens and 256 positions at least.
    """
    build_tokenizer().save_pretrained(folder / "model")
    (model or _model()).save_pretrained(folder / "model")
    prompts = folder / "prompts.jsonl"
    with open(prompts, "w") as stream:
        for a, b in itertools.product(range(1, 9), range(1, 6)):
            stream.write(json.dumps({"problem": f"{a}+{b}=?", "answer": str(a + b)}) + "\n")
    prompt_set = {"source": str(prompts), "system_prompt": None, "max_prompt_tokens": 64}
    config = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "steps": 2,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": prompt_set,
        "reward": {"function": "tests.support.reward_functions:even_length", "workers": 1},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_response_tokens": 24},
        "engine": {"max_total_tokens": 8192},
        "actor": {"max_tokens_per_micro_batch": 512},
        "optimizer": {"learning_rate": 1e-3},
        "phases": [
            {
                "name": "NSR-PreRL",
                "until_step": 1,
                "space": {"name": "pre_train"},
                "advantage": {"name": "group_mean"},
                "filter": "negative",
                "coefficient": 0.01,
            },
            {"name": "GRPO", "space": {"name": "post_train"}, "advantage": {"name": "group_standardised"}},
        ],
        "evaluation": {"sets": [{"name": "held-out", "limit": 8, **prompt_set}]},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


MARK = "DSRL_TEST_PROCESS"
"""Environment variable by which `processes_left_behind` knows the processes of a command."""


def dsrl(*arguments: str, processes: int = 1, timeout_seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the `dsrl` command, under torchrun where there are several processes."""
    return subprocess.run(
        [*launcher(processes), "-m", "megatron_dsrl.cli", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", MARK: str(os.getpid())},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


def launcher(processes: int) -> list[str]:
    """The beginning of a `python -m ...` command; torchrun where there are several processes."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def processes_left_behind() -> list[psutil.Process]:
    """Processes that commands of this test session started and that still run."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(os.getpid()):
                left.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return left


def _model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)
