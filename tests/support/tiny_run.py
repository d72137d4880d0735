"""A small run of sums over random weights, as files on disk: what `dsrl train` needs."""

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import torch
import yaml
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE, build_tokenizer
from tests.support.forked import REPOSITORY, ForkedProcess, fork, forked_processes


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
"""Environment variable by which `processes_left_behind` knows what a command has started."""
SECONDS_TO_END = 10.0
"""How long a process may outlive the command that started it."""


def dsrl(
    *arguments: str, processes: int = 1, timeout_seconds: float = 240, prepare: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the `dsrl` command, under torchrun for several processes.

    Args:
        arguments: of the command.
        processes: see `start_dsrl`.
        timeout_seconds: limit of the command.
        prepare: see `tests.support.forked.fork`.

    Raises:
        subprocess.TimeoutExpired: it was killed after that many seconds.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start_dsrl(
            *arguments, processes=processes, output=output.fileno(), errors=errors.fileno(), prepare=prepare
        )
        try:
            status = process.wait(timeout_seconds)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(["dsrl", *arguments], status, output.read(), errors.read())


def start_dsrl(
    *arguments: str, processes: int = 1, output: int = 1, errors: int = 2, prepare: str | None = None
) -> ForkedProcess:
    """Start the `dsrl` command as a fork of a process that has imported Megatron.

    Args:
        arguments: of the command.
        processes: several are forks of one process that runs torchrun's agent.
        output: file descriptor of its standard output.
        errors: file descriptor of its standard error.
        prepare: see `tests.support.forked.fork`.
    """
    program = ("megatron_dsrl.cli", *arguments)
    return fork(
        *(run_under_torchrun, processes, *program) if processes > 1 else (run_program, *program),
        environment=os.environ | {"OMP_NUM_THREADS": "1", MARK: str(os.getpid())},
        folder=REPOSITORY,
        output=output,
        errors=errors,
        prepare=prepare,
    )


def run_program(module: str, *arguments: str) -> None:
    """Run `python -m module arguments` in this process."""
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_under_torchrun(processes: int, *program: str) -> None:
    """Run `torchrun --standalone --nproc-per-node processes -m program` in this process; its ranks are forks."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
    )
    elastic_launch(config, run_program)(*program)


def launcher(processes: int) -> list[str]:
    """The beginning of a `python -m ...` command; torchrun for several processes."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def processes_left_behind() -> list[psutil.Process]:
    """Processes that commands of this test session started and that do not end by themselves.

    A command has ended before the last of its processes has: the kernel kills what depends on it, and Python's own
    helper processes notice a closed pipe, a moment later.
    """
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := _processes_of_commands()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _processes_of_commands() -> list[psutil.Process]:
    running = {process.pid: process for process in forked_processes()}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(os.getpid()):
                running[process.pid] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return list(running.values())


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


def copy_until(run: Path, step: int, name: str) -> Path:
    """A copy of a run beside it, as if it had ended after `step`: without later checkpoints and without exports."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(copy / "hf")
    return copy
