"""The tiny task's files and its base model, trained by the project's own Megatron actor; see make_base.py."""

import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from examples.tiny_dsrl.arithmetic import (
    NO_NOISE,
    Noise,
    Problem,
    different_problems,
    draw_problems,
    gold_solution,
    write_solution,
)
from examples.tiny_dsrl.base_settings import MADE_FROM, VOCAB_SIZE, Settings, fingerprint
from examples.tiny_dsrl.tokenizer import build_tokenizer
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.advantages import GroupMean
from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.losses import supervised_loss
from megatron_dsrl.algorithms.objective import Objective
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain, ScoredSequence
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.config.actor import ActorConfig, OptimizerConfig
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.config.model import ModelConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompts import render
from megatron_dsrl.data.tokenizer import context_token_ids, load_tokenizer


def make(output: Path, settings: Settings) -> None:
    """Make everything; all ranks call it. The folder appears when it is complete, and replaces an older one."""
    partial = _shared(_make_partial_folder(output, settings) if dist.get_rank() == 0 else None)
    try:
        train_base(partial / "model", partial / "base", settings)
        if dist.get_rank() == 0:
            shutil.rmtree(partial / "model")
            (partial / MADE_FROM).write_text(fingerprint(settings) + "\n", encoding="utf-8")
            shutil.rmtree(output, ignore_errors=True)
            partial.rename(output)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _make_partial_folder(output: Path, settings: Settings) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    partial.chmod(0o755)
    write_problems(partial, settings)
    write_model_folder(partial / "model", settings.architecture)
    return partial


def write_problems(folder: Path, settings: Settings) -> None:
    """`train.jsonl` and `held_out.jsonl`."""
    counts = {"train": settings.train_problems, "held_out": settings.held_out_problems}
    for split, count in counts.items():
        problems = different_problems(split, count, random.Random(f"{settings.seed} {split}"))
        lines = [json.dumps(as_row(problem)) + "\n" for problem in problems]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def as_row(problem: Problem) -> dict[str, str]:
    """A problem as a line of a file. `dsrl sft` can learn the solution; RL only sees the answer."""
    return {"problem": problem.text, "answer": problem.answer, "solution": gold_solution(problem)}


class TrainingSettings(Protocol):
    """What base models have in common."""

    @property
    def seed(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...


def write_model_folder(folder: Path, architecture: Mapping[str, Any]) -> None:
    """An HF folder without weights: config.json and the tokenizer."""
    folder.mkdir()
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {**architecture, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_base(model: Path, output: Path, settings: Settings) -> None:
    """Supervised training from random weights; writes the HF folder `output`. All ranks."""
    tokenizer = load_tokenizer(str(model), VOCAB_SIZE)
    actor = build_actor(training_config("tiny_base", model, settings), model)
    for step, documents in enumerate(corpus(tokenizer, settings), start=1):
        if step == 1:
            say_on_first_rank("stage 1/2: correct solutions")
        if step == settings.correct_steps + 1:
            say_on_first_rank("stage 2/2: noisy ones (the loss rises on purpose)")
        metrics = actor.update([Objective(as_experience(documents), supervised_loss)])
        if step % 50 == 0 or step == 1:
            say_on_first_rank(f"step {step}/{settings.steps}  loss {metrics.loss:.3f}")
    actor.export_hf(output)


def training_config(name: str, model: Path, settings: TrainingSettings) -> RunConfig:
    """The settings that the actor needs. Nothing is sampled, so data and phases are placeholders.

    Args:
        name: of the run, which only messages show.
        model: folder with the config.json.
        settings: of any base model.
    """
    return RunConfig(
        name=name,
        seed=settings.seed,
        steps=settings.steps,
        model=ModelConfig(path=str(model), random_init=True, dtype="float32"),
        actor=ActorConfig(max_tokens_per_micro_batch=8192),
        optimizer=OptimizerConfig(
            learning_rate=settings.learning_rate, warmup_steps=20, decay="linear", betas=(0.9, 0.98)
        ),
        data=DataConfig(source="unused"),
        phases=[PhaseConfig(name="unused", space=PostTrain(), advantage=GroupMean())],
    )


def corpus(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Iterator[list[ScoredSequence]]:
    """The documents of each step, the same on every rank."""
    rng = random.Random(f"{settings.seed} corpus")
    problems = draw_problems("corpus", rng)
    for step in range(settings.steps):
        correct = step < settings.correct_steps
        noise, unprompted = (NO_NOISE, 0.0) if correct else (settings.noise, settings.unprompted)
        yield [
            document(next(problems), noise, rng.random() < unprompted, tokenizer, rng)
            for _ in range(settings.documents_per_step)
        ]


def document(
    problem: Problem, noise: Noise, unprompted: bool, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> ScoredSequence:
    """A solution after its question, or one without a question; only the solution is scored."""
    text = write_solution(problem, noise, rng).text + tokenizer.eos_token
    response = tokenizer.encode(text, add_special_tokens=False)
    if unprompted:
        return PreTrain().sequence((), response, context_token_ids(tokenizer, PreTrain().context_text))
    prompt = render(problem.text, DataConfig(source="unused", system_prompt=None), tokenizer)
    return PostTrain().sequence(tokenizer.encode(prompt, add_special_tokens=False), response)


def as_experience(documents: list[ScoredSequence]) -> Experience:
    """Documents as the actor takes them; the supervised loss uses neither advantages nor engine log-probs."""
    nothing = tuple(torch.zeros(each.num_scored) for each in documents)
    return Experience(
        sequences=tuple(documents),
        rewards=torch.zeros(len(documents)),
        groups=torch.arange(len(documents)),
        engine_log_probs=nothing,
        prompt_in_context=True,
        truncated=torch.zeros(len(documents), dtype=torch.bool),
        advantages=nothing,
    )


def _shared(value: Path | None) -> Path:
    """Rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
