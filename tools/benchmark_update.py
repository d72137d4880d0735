#!/usr/bin/env python3
"""What skipping the old-log-prob pass saves.

With one optimizer step per rollout the old log-probs are the current ones: the actor takes them from the update's own
forward pass, and a test shows that the result is the same bit for bit. This measures the pass that is left out beside
the update, on a random Qwen3 and random samples, in one process.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.advantages import GroupStandardised
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.objective import build_objectives
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.config.actor import ActorConfig
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.config.model import ModelConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.build import DTYPES
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.platform import current_platform, silence_expected_warnings

GRPO = PhaseConfig(name="GRPO", space=PostTrain(), advantage=GroupStandardised())


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """The config.json of a Qwen3 of the wanted width and depth."""
    heads = max(8, options.hidden_size // 128)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden_size,
        "intermediate_size": 3 * options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": options.hidden_size // heads,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))


def random_responses(options: argparse.Namespace) -> list[Response]:
    """Groups of 8 with random rewards."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(options.vocabulary, (length,), generator=generator).tolist()

    prompts = [tokens(options.prompt_tokens) for _ in range(-(-options.samples // 8))]
    rewards = torch.randint(2, (options.samples,), generator=generator).tolist()
    length = options.response_tokens
    return [
        Response(prompts[i // 8], tokens(length), [-5.0] * length, float(reward), i // 8)
        for i, reward in enumerate(rewards)
    ]


def fastest(work: Callable[[], object], repetitions: int) -> float:
    """Seconds: the process's own on CPU, which others share, and of the clock on a GPU."""
    clock = time.perf_counter if current_platform().name == "cuda" else time.process_time
    seconds = []
    for _ in range(repetitions):
        started = clock()
        work()
        seconds.append(clock() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=192)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    silence_expected_warnings()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, options)
        config = RunConfig(
            name="benchmark",
            steps=1,
            model=ModelConfig(path=name, dtype=options.dtype, random_init=True),
            actor=ActorConfig(max_tokens_per_micro_batch=2048),
            data=PromptSetConfig(source="unused"),
            phases=[GRPO],
        )
        with parallel_layout(config.parallel, seed=1):
            report(build_actor(config, folder), options)
        destroy_parallel()


def report(actor: Actor, options: argparse.Namespace) -> None:
    experience = build_experience(random_responses(options), GRPO.space)
    objectives = build_objectives(GRPO, [experience], max_response_tokens=options.response_tokens)
    update = fastest(lambda: actor.update(objectives), options.repetitions)
    skipped = fastest(lambda: actor.log_probs(experience), options.repetitions)
    print(f"{options.samples} samples of {options.prompt_tokens} + {options.response_tokens} tokens, 1 thread(s)")
    print(f"update                       {update:6.2f} s")
    print(f"old-log-prob pass, skipped   {skipped:6.2f} s: {skipped / (skipped + update):.0%} of both")


if __name__ == "__main__":
    main()
