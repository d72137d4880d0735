#!/usr/bin/env python3
"""GRPO with TRL, as `benchmark_against_trl.py` runs it. Needs TRL in its environment, and nothing from this project.

Reads its settings as JSON from the first argument, and appends one line of JSON per step to the file `records`.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class RecordSteps(TrainerCallback):
    """Appends a line when a step has ended."""

    def __init__(self, records: Path) -> None:
        self._records = records

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" in logs:
            with self._records.open("a") as file:
                file.write(json.dumps({"step": state.global_step, "reward": float(logs["reward"])}) + "\n")


def main(settings: dict[str, Any]) -> None:
    """Train with TRL and write the seconds of every step; `settings` are those of `benchmark_against_trl.py`."""
    score = getattr(importlib.import_module("benchmark_rewards"), settings["reward"])

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [score(completion, gold) for completion, gold in zip(completions, answer)]

    samples, micro_batch = settings["prompts"] * settings["samples_per_prompt"], settings["micro_batch"]
    config = GRPOConfig(
        output_dir=settings["output"],
        use_cpu=True,
        bf16=False,
        seed=1,
        max_steps=settings["steps"],
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=samples // micro_batch,
        num_generations=settings["samples_per_prompt"],
        max_completion_length=settings["response_tokens"],
        temperature=1.0,
        beta=0.0,  # no reference model, as in the configuration it is compared with
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",  # the mean over all tokens of the batch
        scale_rewards="group",
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.01,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": settings["dtype"]},
        disable_dropout=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    torch.set_num_threads(settings["threads"])
    rows = [json.loads(line) for line in Path(settings["problems"]).read_text().splitlines()]
    GRPOTrainer(
        model=settings["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[RecordSteps(Path(settings["records"]))],
    ).train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
