"""Make the tiny task: problems, tokenizer, and a base model that errs, trained by the project's own Megatron actor.

    torchrun --nproc-per-node 2 -m examples.tiny_dsrl.make_base
    torchrun --nproc-per-node 2 -m examples.tiny_dsrl.make_base --model experts

(or `python -m ...` in one process) makes a dense model or a mixture of experts. The output folder then holds
`train.jsonl` and `held_out.jsonl` (problem, answer) and the HF folder `base/`. It is complete or absent, and it is made
only once: `made_from` names the settings and the source files that it was made from, and as long as they are the same
nothing is done.

The base is trained on correct solutions first, so that it learns to calculate, and then on noisy ones, so that it
errs. Some of the noisy documents have no question: they open with <|im_start|> and hold a solution. A language model
knows such texts from pre-training, and this one too needs a log P(y) for the pre-train space to update.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from examples.tiny_dsrl.arithmetic import (
    NO_NOISE,
    Noise,
    Problem,
    different_problems,
    draw_problems,
    write_solution,
)
from examples.tiny_dsrl.tokenizer import VOCAB_SIZE, build_tokenizer
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.advantages import GroupMean
from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.losses import supervised_loss
from megatron_dsrl.algorithms.objective import Objective
from megatron_dsrl.algorithms.spaces import ScoredSequence, in_post_train_space, in_pre_train_space
from megatron_dsrl.config.actor import ActorConfig, OptimizerConfig
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.config.model import ModelConfig
from megatron_dsrl.config.phase import PhaseConfig, PostTrainSpaceConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompts import render
from megatron_dsrl.data.tokenizer import bos_token_ids, load_tokenizer
from megatron_dsrl.errors import UserError
from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel

MADE_FROM = "made_from"

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "float32",
}
"""Qwen3 with about a million parameters."""

EXPERTS = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
"""Qwen3-MoE: the dense model's feed-forward layers divided among eight experts four times, two of them per token."""

MODELS = {"dense": (DENSE, ".cache/tiny_dsrl"), "experts": (EXPERTS, ".cache/tiny_dsrl_experts")}
"""Architecture and output folder by the name on the command line."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is made."""

    architecture: Mapping[str, Any] = field(default_factory=lambda: DENSE)
    """The model's config.json, tokens left out."""
    seed: int = 1
    steps: int = 1300
    documents_per_step: int = 16
    learning_rate: float = 1.5e-3
    correct_part: float = 0.8
    """Part of the steps, the first ones, that see only correct solutions to questions."""
    unprompted: float = 0.2
    """Of a document of the later steps: it has no question."""
    noise: Noise = Noise(
        hasty=0.6,
        forgotten_operation=0.64,
        merged_step=0.6,
        carry=0.1,
        step=0.04,
        rambling=0.04,
        unboxed=0.06,
        wrong_box=0.03,
    )
    train_problems: int = 4000
    held_out_problems: int = 400


def fingerprint(settings: Settings) -> str:
    """The settings and the source files of this folder, as one hash."""
    parts = [json.dumps(asdict(settings), sort_keys=True)]
    parts += [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_made(output: Path, settings: Settings) -> bool:
    """Whether the folder holds what these settings make. Raises UserError for a folder that is something else."""
    if not output.exists():
        return False
    mark = output / MADE_FROM
    if not mark.is_file():
        raise UserError(f"--output: {output} exists and was not made by this program; remove it or choose another")
    return mark.read_text(encoding="utf-8").strip() == fingerprint(settings)


def make(output: Path, settings: Settings) -> None:
    """Make everything; all ranks call it. The folder appears when it is complete, in place of an older one."""
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
        rows = [json.dumps({"problem": problem.text, "answer": problem.answer}) + "\n" for problem in problems]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")


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
    actor = build_actor(training_config(model, settings), model)
    for step, documents in enumerate(corpus(tokenizer, settings), start=1):
        metrics = actor.update([Objective(as_experience(documents), supervised_loss)])
        if dist.get_rank() == 0 and (step % 50 == 0 or step == 1):
            print(f"step {step}/{settings.steps}  loss {metrics.loss:.3f}", flush=True)
    actor.export_hf(output)


def training_config(model: Path, settings: Settings) -> RunConfig:
    """What the actor needs to know; nothing is sampled, so data and phases are only formally there."""
    return RunConfig(
        name="tiny_base",
        seed=settings.seed,
        steps=settings.steps,
        model=ModelConfig(path=str(model), random_init=True, dtype="float32"),
        actor=ActorConfig(max_tokens_per_micro_batch=8192),
        optimizer=OptimizerConfig(
            learning_rate=settings.learning_rate, warmup_steps=20, decay="linear", betas=(0.9, 0.98)
        ),
        data=PromptSetConfig(source="unused"),
        phases=[PhaseConfig(name="unused", space=PostTrainSpaceConfig(), advantage=GroupMean())],
    )


def corpus(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Iterator[list[ScoredSequence]]:
    """The documents of each step, the same on every rank."""
    rng = random.Random(f"{settings.seed} corpus")
    problems = draw_problems("corpus", rng)
    for step in range(settings.steps):
        correct = step < settings.correct_part * settings.steps
        noise, unprompted = (NO_NOISE, 0.0) if correct else (settings.noise, settings.unprompted)
        yield [
            document(next(problems), noise, rng.random() < unprompted, tokenizer, rng)
            for _ in range(settings.documents_per_step)
        ]


def document(
    problem: Problem, noise: Noise, unprompted: bool, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> ScoredSequence:
    """A solution behind its question, or one that nobody asked for; only the solution is scored."""
    text = write_solution(problem, noise, rng).text + tokenizer.eos_token
    response = tokenizer.encode(text, add_special_tokens=False)
    if unprompted:
        return in_pre_train_space(bos_token_ids(tokenizer, "im_start"), response)
    prompt = render(problem.text, PromptSetConfig(source="unused", system_prompt=None), tokenizer)
    return in_post_train_space(tokenizer.encode(prompt, add_special_tokens=False), response)


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


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dense", help="which model to make")
    parser.add_argument("--output", type=Path, help="folder to make; by default the one of the configurations")
    options = parser.parse_args()
    architecture, folder = MODELS[options.model]
    output, settings = options.output or Path(folder), Settings(architecture)
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        if is_made(output, settings):
            if speaks:
                print(f"{output} is made already")
            return 0
        initialize_parallel(training_config(output, settings).parallel, settings.seed)
        make(output, settings)
        if speaks:
            print(f"made {output}")
    except UserError as error:
        if speaks:
            print(error, file=sys.stderr)
        return 2
    finally:
        destroy_parallel()
    return 0


if __name__ == "__main__":
    sys.exit(main())
