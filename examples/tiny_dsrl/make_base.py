"""Make the tiny task: problems, tokenizer, and a base model that errs, trained by the project's own Megatron actor.

    torchrun --nproc-per-node 2 -m examples.tiny_dsrl.make_base
    torchrun --nproc-per-node 2 -m examples.tiny_dsrl.make_base --model experts

(or `python -m ...` in one process) makes a dense model or a mixture of experts. The output folder then holds
`train.jsonl` and `held_out.jsonl` (problem, answer, solution) and the HF folder `base/`. It is complete or absent, and
it is made only once: `made_from` names the settings and the source files that it was made from, and as long as they are
the same nothing is done.

The base is trained on correct solutions first, so that it learns to calculate, and then on noisy ones, so that it
errs. Some of the noisy documents have no question: they open with <|im_start|> and hold a solution. A language model
knows such texts from pre-training, and this one too needs a log P(y) for the pre-train space to update.
"""

import argparse
import os
import sys
from pathlib import Path

from examples.tiny_dsrl.base_settings import MODELS, Settings, is_made
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.run.loading import loading_megatron


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dense", help="which model to make")
    parser.add_argument("--output", type=Path, help="folder to make (default: the one that the configurations use)")
    options = parser.parse_args()
    architecture, folder = MODELS[options.model]
    output, settings = options.output or Path(folder), Settings(architecture)
    try:
        if is_made(output, settings):
            say_on_first_rank(f"{output} is up to date")
            return 0
        _make(output, settings)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    say_on_first_rank(f"made {output}")
    return 0


def _make(output: Path, settings: Settings) -> None:
    with loading_megatron():
        from examples.tiny_dsrl.base_model import make, training_config
        from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel

    initialize_parallel(training_config("tiny_base", output, settings).parallel, settings.seed)
    try:
        make(output, settings)
    finally:
        destroy_parallel()


if __name__ == "__main__":
    sys.exit(main())
