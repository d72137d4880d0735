"""Supervised training of a laboratory base model; see make_base.py."""

import random
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from examples.laboratory.settings import VOCAB_SIZE, BaseSettings
from examples.laboratory.task import Problem, draw_problems, write_response
from examples.tiny_dsrl.base_model import as_experience, training_config
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.losses import supervised_loss
from megatron_dsrl.algorithms.objective import Objective
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain, ScoredSequence
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.data.prompts import render
from megatron_dsrl.data.tokenizer import context_token_ids, load_tokenizer

PROMPTS = DataConfig(source="unused", system_prompt=None)
"""How a question becomes a chat prompt, as in RL."""


def train_base(model: Path, output: Path, settings: BaseSettings) -> None:
    """Train from random weights and write the HF folder `output`. All ranks."""
    tokenizer = load_tokenizer(str(model), VOCAB_SIZE)
    actor = build_actor(training_config("laboratory_base", model, settings), model)
    for step, batch in enumerate(documents(tokenizer, settings), start=1):
        if step in (1, settings.patient_steps + 1):
            say_on_first_rank(f"{'patient' if step <= settings.patient_steps else 'hasty'} documents")
        metrics = actor.update([Objective(as_experience(batch), supervised_loss)])
        if step % 50 == 0 or step == 1:
            say_on_first_rank(f"step {step}/{settings.steps}  loss {metrics.loss:.3f}")
    actor.export_hf(output)


def documents(tokenizer: PreTrainedTokenizerBase, settings: BaseSettings) -> Iterator[list[ScoredSequence]]:
    """The documents of each step, the same on every rank."""
    rng, family = random.Random(f"{settings.seed} corpus"), settings.family
    problems = draw_problems("corpus", family.numbers, rng)
    for step in range(settings.steps):
        patient = step < settings.patient_steps
        unprompted = 0.0 if patient else family.unprompted
        yield [
            _document(problem, write_response(problem, family, patient, rng), rng.random() < unprompted, tokenizer)
            for _, problem in zip(range(settings.documents_per_step), problems)
        ]


def _document(problem: Problem, response: str, unprompted: bool, tokenizer: PreTrainedTokenizerBase) -> ScoredSequence:
    """A response after its question, or after <|im_start|> alone; only the response is scored."""
    response_ids = tokenizer.encode(response + tokenizer.eos_token, add_special_tokens=False)
    if unprompted:
        return PreTrain().sequence((), response_ids, context_token_ids(tokenizer, PreTrain().context_text))
    prompt = render(problem.text, PROMPTS, tokenizer)
    return PostTrain().sequence(tokenizer.encode(prompt, add_special_tokens=False), response_ids)
