"""Make a base model of the laboratory and its problems, with the project's own Megatron actor.

    torchrun --nproc-per-node 2 -m examples.laboratory.make_base paper_like

makes `.cache/laboratory/paper_like`: `train.jsonl` and `held_out.jsonl` (problem, answer) and the HF folder `base/`.
`python -m` does the same in one process. A folder that exists and was made from the same settings is kept.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

from examples.laboratory.settings import ARCHITECTURE, BASES, CACHE, PIECES, VOCAB_SIZE, BaseSettings
from examples.laboratory.task import different_problems
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.run.loading import loading_megatron

MADE_FROM = "made_from.json"


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=BASES, help="which base to make")
    parser.add_argument("--output", type=Path, help="folder to make (default: .cache/laboratory/BASE)")
    options = parser.parse_args()
    output, settings = options.output or Path(CACHE) / options.base, BASES[options.base]
    if is_made(output, settings):
        say_on_first_rank(f"{output} is up to date")
        return 0
    if output.exists():
        if _is_first_rank():
            print(f"{output} exists and was made from other settings: remove it or choose another", file=sys.stderr)
        return 2
    make(output, settings)
    say_on_first_rank(f"made {output}")
    return 0


def is_made(output: Path, settings: BaseSettings) -> bool:
    """Whether the folder holds what these settings make."""
    mark = output / MADE_FROM
    return mark.is_file() and mark.read_text(encoding="utf-8") == settings.model_dump_json(indent=2)


def make(output: Path, settings: BaseSettings) -> None:
    """Make the folder; all ranks call it. It appears when it is complete."""
    with loading_megatron():
        import torch.distributed as dist

        from examples.laboratory.base_model import train_base
        from examples.tiny_dsrl.base_model import training_config
        from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel

    partial = output.with_name(f".{output.name}.partial")
    initialize_parallel(training_config("laboratory_base", partial / "untrained", settings).parallel, settings.seed)
    try:
        if _is_first_rank():
            shutil.rmtree(partial, ignore_errors=True)
            write_inputs(partial, settings)
        dist.barrier()
        train_base(partial / "untrained", partial / "base", settings)
        if _is_first_rank():
            shutil.rmtree(partial / "untrained")
            (partial / MADE_FROM).write_text(settings.model_dump_json(indent=2), encoding="utf-8")
            partial.rename(output)
    finally:
        destroy_parallel()


def write_inputs(folder: Path, settings: BaseSettings) -> None:
    """Write `train.jsonl`, `held_out.jsonl`, and `untrained/`: a model folder without weights."""
    from examples.tiny_dsrl.tokenizer import build_tokenizer

    model = folder / "untrained"
    model.mkdir(parents=True)
    for split, wanted in (("train", settings.train_problems), ("held_out", settings.held_out_problems)):
        rng = random.Random(f"{settings.seed} {split}")
        problems = different_problems(split, settings.family.numbers, wanted, rng)
        rows = [json.dumps({"problem": problem.text, "answer": problem.text}) + "\n" for problem in problems]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    tokenizer = build_tokenizer(PIECES, VOCAB_SIZE)
    tokenizer.save_pretrained(model)
    config = {**ARCHITECTURE, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
