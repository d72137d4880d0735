"""The files of a training with random weights: model folder, prompts, configuration."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.tiny_dsrl.tokenizer import build_tokenizer
from megatron_dsrl.config.yaml_text import format_yaml
from tools.first_gpu_run.stages import FIRST_STEP_IS_PRERL, Stage, Training
from tools.gpu_record.architectures import TINY, write_architecture

ON_CPU = {
    "rollout.prompts_per_step": "8", "rollout.samples_per_prompt": "4", "rollout.max_response_tokens": "24",
    "engine.max_total_tokens": "8192", "engine.max_context_tokens": "256", "actor.max_tokens_per_micro_batch": "512",
    "model.dtype": "float32",
}  # fmt: skip
PROCESSES_ON_CPU = 4
"""Processes of the eight-GPU stages in a dry run, split in two by tensor parallelism."""


@dataclass(frozen=True)
class RunFiles:
    """What a training stage is started with."""

    files: tuple[str, ...]
    overrides: tuple[str, ...]
    processes: int
    run_folder: Path
    model_folder: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        """What Python is called with."""
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes), "-m")
        command = ("megatron_dsrl.cli", "train", *self.files, *self.overrides)
        return ("-m", *(launcher if self.processes > 1 else ()), *command)


def write_run(folder: Path, stage: Stage, dry_run: bool) -> RunFiles:
    """Write the files of a training stage into its folder."""
    training = stage.training
    assert training is not None
    model = folder / "model"
    model.mkdir(parents=True)
    build_tokenizer().save_pretrained(model)
    write_architecture(model, TINY if dry_run else training.model)
    problems = [{"problem": f"{number}+{number}=?", "answer": str(2 * number)} for number in range(256)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    processes = min(max(stage.gpus, 1), PROCESSES_ON_CPU) if dry_run else stage.gpus
    own = folder / "run.yaml"
    own.write_text(format_yaml(_settings(folder, training, stage.limit_minutes)))
    overrides = FIRST_STEP_IS_PRERL | dict(training.overrides)
    if dry_run:
        overrides |= ON_CPU | ({"parallel.tensor_parallel_size": "2"} if stage.gpus > PROCESSES_ON_CPU else {})
    return RunFiles(
        files=(training.configuration, str(own)),
        overrides=tuple(f"{path}={value}" for path, value in overrides.items()),
        processes=processes,
        run_folder=folder / "run",
        model_folder=model,
    )


def _settings(folder: Path, training: Training, limit_minutes: float) -> dict[str, Any]:
    # A collective that hangs must end before the stage does, because NCCL's flight recorder is written then; and the
    # sampling of a step, for which collectives wait, before that.
    collective_seconds = round(limit_minutes * 60 * 0.7)
    rollout: dict[str, Any] = {"step_timeout_seconds": round(collective_seconds * 0.7)}
    actor: dict[str, Any] = {}
    if not training.own_batch:
        rollout |= {"prompts_per_step": 32, "samples_per_prompt": 8, "max_response_tokens": 2048}
        actor = {"max_tokens_per_micro_batch": 16384}
    return {
        "name": "run",
        "output_dir": str(folder),
        "steps": training.steps,
        "model": {"path": str(folder / "model"), "random_init": True},
        "data": {
            "source": str(folder / "prompts.jsonl"),
            "answer_field": "answer",
            "system_prompt": None,
            "max_prompt_tokens": 64,
        },
        "reward": {"function": "tools.first_gpu_run.reward:checksum_parity", "workers": 1},
        "rollout": rollout,
        "actor": actor,
        "parallel": {
            "collective_timeout_seconds": collective_seconds,
            "distributed_timeout_seconds": collective_seconds,
        },
        "evaluation": {"early_every_steps": None, "early_until_step": 0, "every_steps": None, "sets": []},
        "checkpoint": {"save_every_steps": None, "export_hf_every_steps": None},
    }
