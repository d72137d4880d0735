"""Compare token log-probs of the same recorded responses by Transformers, the Megatron actor and the SGLang engine.

    dsrl rollout examples/smollm2/sample.yaml                      # the engine samples and records its log-probs
    python -m examples.smollm2.parity .cache/smollm2/model runs/smollm2_samples
    torchrun --nproc-per-node 3 -m examples.smollm2.parity .cache/smollm2/model runs/smollm2_samples \
        parallel.tensor_parallel_size=3

Prints the largest and the mean absolute difference between each two of the three, in nats.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import apply_override
from megatron_dsrl.config.model import GradientAnalysisConfig
from megatron_dsrl.config.validate import validated
from megatron_dsrl.config.yaml_text import KeyPath
from megatron_dsrl.run.loading import loading_megatron

with loading_megatron():
    import torch
    from torch import Tensor

    from megatron_dsrl.analysis.responses import read_steps
    from megatron_dsrl.analysis.scoring import TokenisedResponse, token_log_probs
    from megatron_dsrl.common.collective import rank
    from megatron_dsrl.model.parallel import destroy_parallel
    from megatron_dsrl.model.source import resolve_model_folder
    from megatron_dsrl.platform.engine_process import prepare_engine_process


@torch.no_grad()
def transformers_log_probs(folder: Path, responses: Sequence[TokenisedResponse], temperature: float) -> list[Tensor]:
    """Log-prob of every response token given its prompt, in float32: one tensor [response tokens] per response."""
    prepare_engine_process()  # Transformers' models import torchvision, which fails without CUDA
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for one in responses:
        row = torch.tensor([[*one.prompt_ids, *one.response_ids]])
        logits = model(row).logits[0, len(one.prompt_ids) - 1 : -1] / temperature
        chosen = torch.tensor(one.response_ids)[:, None]
        found.append(torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0])
    return found


def compare(model: str, run: Path, overrides: Sequence[str]) -> None:
    """Score the first recorded step, sampled at temperature 1, and print the differences. Collective over the ranks.

    Args:
        model: HF folder or hub name of the model that sampled it.
        run: folder with `rollouts`.
        overrides: fields of `GradientAnalysisConfig`.

    Raises:
        UserError: the run has no recorded samples, an override is invalid, or the layout does not fit the model.
    """
    data: dict[str, Any] = {"model": {"path": model, "dtype": "float32"}}
    places: dict[KeyPath, str] = {}
    for override in overrides:
        apply_override(data, override, places)
    config = validated(GradientAnalysisConfig, data, places, "parity", "overrides")
    samples = [(group.prompt, one) for group in next(read_steps(run))[1] for one in group.samples if one.response_ids]
    responses = [
        TokenisedResponse(0, prompt.index, 0, sample.reward, prompt.token_ids, sample.response_ids)
        for prompt, sample in samples
    ]
    try:
        megatron = torch.cat([torch.tensor(scores.with_prompt) for scores in token_log_probs(config, responses)])
        first = rank() == 0
    finally:
        destroy_parallel()
    if not first:
        return
    folder = resolve_model_folder(config.model.path)
    log_probs = {
        "Megatron": megatron,
        "Transformers": torch.cat(transformers_log_probs(folder, responses, config.temperature)),
        "SGLang": torch.cat([torch.tensor(sample.log_probs) for _, sample in samples]),
    }
    print(f"{len(samples)} responses, {len(megatron)} tokens, mean log-prob {megatron.mean():.3f}")
    for one, other in combinations(log_probs, 2):
        gap = (log_probs[one] - log_probs[other]).abs()
        print(f"{one} and {other}: largest difference {gap.max():.1e}, mean {gap.mean():.1e}")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="HF folder or hub name of the model that sampled them")
    parser.add_argument("run", type=Path, help="folder of a run with recorded samples")
    parser.add_argument("overrides", nargs="*", help="fields of `model` or `parallel`, such as model.dtype=float32")
    arguments = parser.parse_args()
    try:
        compare(arguments.model, arguments.run, arguments.overrides)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
