"""The inputs of a run: model description, tokenizer, prompts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_dsrl.common.checksum import fingerprint
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.config.run import EvaluationSetConfig, RunConfig
from megatron_dsrl.data.demonstrations import load_demonstrations
from megatron_dsrl.data.mixture import in_mixture
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.prompts import load_prompts
from megatron_dsrl.data.tokenizer import context_token_ids, decode, encode, load_tokenizer, stop_token_ids
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.rollout.pass_rates import with_pass_rates


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a run, read on every rank before anything expensive starts."""

    run_folder: Path
    model_folder: Path
    model: dict[str, Any]
    """Shapes and constants of the model from its config.json; with LoRA also the fingerprint of its weights, which
    checkpoints do not contain."""
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    """Tokens that end a response."""
    prompts: Sequence[Prompt]
    """To train on; with `rollout.source: dataset` these and those of the evaluation sets are `Demonstration`s."""
    evaluation_sets: Sequence[tuple[EvaluationSetConfig, Sequence[Prompt]]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response without special tokens."""
        return decode(self.tokenizer, token_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are recognised, and none are added."""
        return encode(self.tokenizer, text)


def load_inputs(config: RunConfig) -> RunInputs:
    """Read all inputs. Raises UserError if the model, its tokenizer, a prompt set or a recorded run is missing or
    invalid, the tokenizer cannot make the context of a space, or a filter leaves no prompt."""
    model_folder = resolve_model_folder(config.model.path, made_by=config.made_by)
    architecture = read_architecture(model_folder)
    tokenizer = load_tokenizer(str(model_folder), architecture.vocab_size)
    for phase in config.phases:
        for objective in phase.objectives.values():
            context_token_ids(tokenizer, objective.space.context_text)

    def load(prompt_set: PromptSetConfig, section: str, max_response_tokens: int | None = None) -> Sequence[Prompt]:
        if config.rollout.source == "engine":
            return load_prompts(prompt_set, tokenizer, section)
        limit = max_response_tokens or config.rollout.max_response_tokens
        return load_demonstrations(prompt_set, tokenizer, limit, section)

    training_sets = [
        (one.name, with_pass_rates(load(one, section), one, section))
        for section, one in config.data.sets_by_section.items()
    ]
    model = asdict(architecture)
    if config.actor.lora:
        model["weights"] = fingerprint(model_folder)
    return RunInputs(
        run_folder=Path(config.output_dir) / config.name,
        model_folder=model_folder,
        model=model,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(tokenizer, model_folder),
        prompts=in_mixture(training_sets),
        evaluation_sets=[
            (evaluation_set, load(evaluation_set, f"evaluation.sets.{i}", evaluation_set.max_response_tokens))
            for i, evaluation_set in enumerate(config.evaluation.sets)
        ],
    )
