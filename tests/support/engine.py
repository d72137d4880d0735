"""What tests of the rollout side have in common."""

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.batch import BatchProgress, BatchRequest, RolloutBatch, WholeFeed
from megatron_dsrl.rollout.custom_generation import CustomGeneration
from megatron_dsrl.rollout.dispatcher import Dispatcher, GroupJudge
from megatron_dsrl.rollout.engine_health import EngineStates
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import connect
from megatron_dsrl.rollout.engines.server_process import SERVER_MAIN
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.unfinished import UnfinishedGroup

STOP_TOKEN_ID = 7


def tiny_run_config(model_folder: Path, **engine: Any) -> RunConfig:
    """A run over the tiny random Qwen3; keyword arguments go to the engine section."""
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "steps": 1,
            "model": {"path": str(model_folder), "dtype": "float32"},
            "data": {"source": "unused.jsonl", "max_prompt_tokens": 64},
            "reward": {"function": "tests.support.reward_functions:response_length", "workers": 1},
            "rollout": {
                "prompts_per_step": 4,
                "samples_per_prompt": 4,
                "max_response_tokens": 24,
                "step_timeout_seconds": 60.0,
            },
            "engine": {"max_total_tokens": 16384, "update_timeout_seconds": 30.0, "startup_timeout_seconds": 120.0}
            | engine,
            "phases": [{"name": "grpo", "space": {"name": "post_train"}, "advantage": {"name": "group_standardised"}}],
        }
    )


@contextmanager
def started_rollout(config: RunConfig, run_folder: Path) -> Iterator[EngineRollout]:
    """The rollout side with its own engine, or that of `engine.urls`; its text is the token ids."""
    rollout = EngineRollout(config, run_folder, (STOP_TOKEN_ID,), decode_as_numbers)
    try:
        rollout.wait_until_ready()
        yield rollout
    finally:
        rollout.close()


def numbered_prompts(count: int) -> list[Prompt]:
    """Prompts of different lengths, with ids that no other prompt shares."""
    return [
        Prompt(100 + number, text=f"prompt {number}", token_ids=tuple(range(20 + number, 30 + 3 * number)), answer="")
        for number in range(count)
    ]


def batch_request(
    groups: Sequence[UnfinishedGroup],
    sampling: SamplingParameters,
    weight_version: int = 0,
    generation: CustomGeneration | None = None,
    versions: Callable[[], range] | None = None,
    **limits: Any,
) -> BatchRequest:
    """A request for all of these groups, without a second attempt; `limits` are fields of `rollout` or `engine`."""
    config = tiny_run_config(Path("model"))
    limits = {"request_attempts": 1} | limits
    of_engine = limits.keys() & type(config.engine).model_fields
    engine = config.engine.model_copy(update={name: limits.pop(name) for name in of_engine})
    assert limits.keys() <= type(config.rollout).model_fields.keys(), limits
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=limits), "engine": engine})
    versions = versions or (lambda: range(weight_version, weight_version + 1))
    return BatchRequest(config, WholeFeed(groups), sampling, versions, generation)


def dispatch(
    batch: RolloutBatch, engines: Sequence[EngineAddress], rewards: RewardPool, progress: BatchProgress
) -> dict[int, str]:
    """Sample a batch on these engines; returns why engines were lost, by number."""
    states = EngineStates()

    async def run() -> None:
        async with connect(engines, 30.0) as clients:
            await Dispatcher(batch, clients, states, GroupJudge(rewards, decode_as_numbers), progress).run()

    asyncio.run(run())
    return states.lost


def decode_as_numbers(token_ids: Sequence[int]) -> str:
    """Token ids as text, instead of a tokenizer."""
    return " ".join(map(str, token_ids))


@torch.no_grad()
def transformers_log_probs(
    model: PreTrainedModel, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
) -> torch.Tensor:
    """Log-prob of every response token by Transformers, [response tokens]."""
    logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0].float()
    log_probs = torch.log_softmax(logits / temperature, dim=-1)[len(prompt_ids) - 1 : -1]
    return log_probs.gather(1, torch.tensor(response_ids)[:, None])[:, 0]


def weights_checker(engine: EngineAddress, action: str) -> dict[str, Any]:
    """SGLang's own tool: `checksum` of every tensor, or `reset_tensors` to random numbers."""
    request = urllib.request.Request(
        f"{engine.url}/weights_checker",
        json.dumps({"action": action}).encode(),
        {"Content-Type": "application/json"} | engine.headers,
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def server_process(engine: EngineAddress) -> int:
    """Process id of an SGLang server that this process has started."""
    port = urlsplit(engine.url).port
    (found,) = (
        process.pid
        for process in psutil.Process().children()
        if SERVER_MAIN in process.cmdline()
        and any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in process.net_connections())
    )
    return found


def start_servers_as(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the processes of servers run this Python program instead of SGLang."""
    start = subprocess.Popen
    monkeypatch.setattr(
        "megatron_dsrl.rollout.engines.server_process.subprocess.Popen",
        lambda command, **options: start(
            [sys.executable, "-c", program] if SERVER_MAIN in command else command, **options
        ),
    )


def processes_of_group(group: int) -> list[psutil.Process]:
    """Processes of a process group that are still alive."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
