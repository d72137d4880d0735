"""Make a base model that sometimes calls a calculator, and its problems, with the project's own Megatron actor.

    python -m examples.tool_use.make_base

makes `.cache/tool_use`: `train.jsonl` and `held_out.jsonl` (problem, answer) and the HF folder `base/`. The base is
trained on correct answers to products. A fifth of them call the calculator and have its result before the answer; the
others state the answer at once. Remove the folder to make it again.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.tiny_dsrl.base_settings import DENSE
from examples.tool_use.task import different_products, draw_products, write_document
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.run.loading import loading_megatron

with loading_megatron():
    from transformers import PreTrainedTokenizerBase

    from examples.tiny_dsrl.base_model import as_experience, training_config
    from examples.tiny_dsrl.tokenizer import PIECES, build_tokenizer
    from megatron_dsrl.actor.build import build_actor
    from megatron_dsrl.algorithms.losses import supervised_loss
    from megatron_dsrl.algorithms.objective import Objective
    from megatron_dsrl.algorithms.spaces import PostTrain, ScoredSequence
    from megatron_dsrl.config.data import DataConfig
    from megatron_dsrl.data.prompts import render
    from megatron_dsrl.model.parallel import parallel_layout

OUTPUT = Path(".cache/tool_use")
MARKERS = ("<tool>", "</tool>", "<result>", "</result>")
"""One token each, so that the engine stops at the end of a call."""
PROBLEMS = {"train": 2000, "held_out": 400}
"""Problems by split."""


@dataclass(frozen=True)
class Settings:
    """How the base is trained."""

    seed: int = 1
    steps: int = 1000
    documents_per_step: int = 32
    learning_rate: float = 1.5e-3
    calls: float = 0.2
    """Part of the documents that calls the calculator."""


def main() -> int:
    """Make the folder; returns the exit status."""
    if (OUTPUT / "base").exists():
        say_on_first_rank(f"{OUTPUT} is up to date")
        return 0
    settings, tokenizer = Settings(), build_tokenizer((*PIECES, *MARKERS))
    write_inputs(tokenizer, settings.seed)
    config = training_config("tool_use_base", OUTPUT / "untrained", settings)
    with parallel_layout(config.parallel, settings.seed):
        actor = build_actor(config, OUTPUT / "untrained")
        for step, batch in enumerate(documents(tokenizer, settings), start=1):
            metrics = actor.update([Objective(as_experience(batch), supervised_loss)])
            if step % 100 == 0 or step == 1:
                say_on_first_rank(f"step {step}/{settings.steps}  loss {metrics.loss:.3f}")
        actor.export_hf(OUTPUT / "base")
    say_on_first_rank(f"made {OUTPUT}")
    return 0


def write_inputs(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Write the problems, and `untrained/`: a model folder without weights."""
    model = OUTPUT / "untrained"
    model.mkdir(parents=True, exist_ok=True)
    for split, count in PROBLEMS.items():
        products = different_products(split, count, random.Random(f"{seed} {split}"))
        rows = [json.dumps({"problem": product.text, "answer": product.answer}) + "\n" for product in products]
        (OUTPUT / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    tokenizer.save_pretrained(model)
    config = {**DENSE, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def documents(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Iterator[list[ScoredSequence]]:
    """The documents of each step."""
    rng = random.Random(f"{settings.seed} corpus")
    products = draw_products("corpus", rng)
    for _ in range(settings.steps):
        batch = []
        for product in (next(products) for _ in range(settings.documents_per_step)):
            prompt = render(product.text, DataConfig(source="unused", system_prompt=None), tokenizer)
            text = write_document(product, rng.random() < settings.calls) + tokenizer.eos_token
            ids = [tokenizer.encode(each, add_special_tokens=False) for each in (prompt, text)]
            batch.append(PostTrain().sequence(*ids))
        yield batch


if __name__ == "__main__":
    sys.exit(main())
