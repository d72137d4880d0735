"""Program of a test, run by torchrun: push weights from every rank, sample on rank 0, compare with Transformers.

Arguments: model folder, run folder, ranks per engine. Rank 0 prints the largest log-prob difference of every sample
as a JSON list on its last line.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed
from transformers import Qwen3ForCausalLM

from megatron_dsrl.rollout.engine_rollout import EngineRollout
from tests.support.engine import numbered_prompts, started_rollout, tiny_run_config, transformers_log_probs


def perturbed_policy(model_folder: str) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def largest_differences(rollout: EngineRollout, policy: Qwen3ForCausalLM) -> list[float]:
    differences = []
    for group in rollout.generate(numbered_prompts(6), 2, rollout.training_sampling, "test"):
        for sample in group.samples:
            reference = transformers_log_probs(policy, group.prompt.token_ids, sample.response_ids, 1.0)
            differences.append((reference - torch.tensor(sample.log_probs)).abs().max().item())
    return differences


def main() -> None:
    model_folder, run_folder, ranks_per_engine = sys.argv[1:]
    torch.distributed.init_process_group("gloo")
    policy = perturbed_policy(model_folder)
    named = list(policy.named_parameters())
    config = tiny_run_config(Path(model_folder), tensor_parallel_size=int(ranks_per_engine))
    with started_rollout(config, Path(run_folder)) as rollout:
        rollout.load_weights(lambda: [named[:9], named[9:]], version=1)
        if torch.distributed.get_rank() == 0:
            print(json.dumps(largest_differences(rollout, policy)), flush=True)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
