"""What tests of the rollout side have in common."""

import json
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.engines.address import EngineAddress

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
            "phases": [
                {"name": "grpo", "space": {"name": "post_train"}, "advantage": {"name": "group_standardised"}}
            ],
        }
    )


def numbered_prompts(count: int) -> list[Prompt]:
    """Prompts of different lengths, with ids that no other prompt shares."""
    return [
        Prompt(100 + number, text=f"prompt {number}", token_ids=tuple(range(20 + number, 30 + 3 * number)), answer="")
        for number in range(count)
    ]


def decode_as_numbers(token_ids: Sequence[int]) -> str:
    """Token ids as text, in place of a tokenizer."""
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


def processes_of_group(group: int) -> list[psutil.Process]:
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
