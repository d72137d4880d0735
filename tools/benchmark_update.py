#!/usr/bin/env python3
"""What an update costs, and what it leaves out.

Two things are not computed. Samples of groups that are all right or all wrong have no gradient, and the update skips
them; here it is measured beside one that computes every sample, for several shares of such groups. And with one
optimizer step per rollout the old log-probs are the current ones, so the pass that would compute them is skipped. A
random Qwen3 and random samples, in one process.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.advantages import GroupStandardised
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.objective import build_objectives
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.config.actor import ActorConfig
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.config.model import ModelConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.build import DTYPES
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.platform import current_platform, silence_expected_warnings

GRPO = PhaseConfig(name="GRPO", space=PostTrain(), advantage=GroupStandardised())
GROUP_SIZE = 8


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


def random_responses(options: argparse.Namespace, uniform_share: float) -> list[Response]:
    """Groups of 8: this share of them all wrong, the others half right."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(options.vocabulary, (length,), generator=generator).tolist()

    groups, length = options.groups, options.response_tokens
    prompts = [tokens(options.prompt_tokens) for _ in range(groups)]
    uniform = round(uniform_share * groups)
    return [
        Response(prompts[group], tokens(length), [-5.0] * length, float(group >= uniform and sample % 2), group)
        for group in range(groups)
        for sample in range(GROUP_SIZE)
    ]


def seconds_of(works: Sequence[Callable[[], object]], repetitions: int) -> list[float]:
    """Shortest time of each, measured in turns. Process time on a CPU, which other programs share, and wall-clock time
    on a GPU."""
    clock = time.perf_counter if current_platform().name == "cuda" else time.process_time
    shortest = [math.inf] * len(works)
    for _ in range(repetitions):
        for i, work in enumerate(works):
            started = clock()
            work()
            shortest[i] = min(shortest[i], clock() - started)
    return shortest


def main() -> None:
    """Command line: times updates on a random model and prints the seconds of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--groups", type=int, default=4, help=f"of {GROUP_SIZE} samples")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=192)
    parser.add_argument("--uniform-shares", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
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
            data=DataConfig(source="unused"),
            phases=[GRPO],
        )
        with parallel_layout(config.parallel, seed=1):
            report(build_actor(config, folder), options)
        destroy_parallel()


def report(actor: Actor, options: argparse.Namespace) -> None:
    """Measure and print the table."""
    table = Table("uniform groups", "update, s", "of every sample, s", "ratio", "old log-probs, s", box=None)
    for share in options.uniform_shares:
        experience = build_experience(random_responses(options, share), GRPO.space)
        objectives = build_objectives(GRPO, [experience], max_response_tokens=options.response_tokens)
        every_sample = [replace(objective, needs_every_sample=True) for objective in objectives]
        update, whole, old_log_probs = seconds_of(
            [
                partial(actor.update, objectives),
                partial(actor.update, every_sample),
                partial(actor.log_probs, experience),
            ],
            options.repetitions,
        )
        seconds = (f"{update:.2f}", f"{whole:.2f}", f"{update / whole:.2f}", f"{old_log_probs:.2f}")
        table.add_row(f"{share:.0%}", *seconds)
    console = Console()
    samples = options.groups * GROUP_SIZE
    console.print(
        f"{samples} samples of {options.prompt_tokens} + {options.response_tokens} tokens, {options.dtype}; "
        f"{torch.get_num_threads()} thread(s), device {current_platform().name}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
