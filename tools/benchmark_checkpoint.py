#!/usr/bin/env python3
"""How long saving a checkpoint blocks training: synchronous and asynchronous saves compared.

Trains a random Qwen3 of about the requested size with Megatron in float32 and saves checkpoints of it: weights and both
Adam moments. It first times steps without a save, then alternates between both kinds of saves, with steps running
during the asynchronous ones. The scratch folder is removed. Use torchrun for several ranks.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.advantages import GroupStandardised
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.objective import Objective, build_objectives
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.checkpoint.state import RunState, current_layout
from megatron_dsrl.checkpoint.store import CheckpointStore
from megatron_dsrl.common.collective import broadcast, gather, rank, world_size
from megatron_dsrl.config.actor import ActorConfig
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel
from megatron_dsrl.platform import silence_expected_warnings

HIDDEN, VOCABULARY, RESPONSE_TOKENS = 512, 32_000, 16
PARAMETERS_PER_LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN
MAX_STEPS_BESIDE = 200
PHASE = PhaseConfig(name="GRPO", space=PostTrain(), advantage=GroupStandardised())


@dataclass
class Seconds:
    """Measurements of one kind of save, one value per save."""

    blocked: list[float] = field(default_factory=list)
    """Time during which no step could run: `save` and publishing."""
    published: list[float] = field(default_factory=list)
    """From the start of the save until the checkpoint appeared."""
    steps_beside: list[float] = field(default_factory=list)
    """Duration of the training steps during the save."""


def write_model_folder(folder: Path, megabytes: float) -> None:
    """Write config.json of a Qwen3 whose float32 weights have about this size."""
    layers = max(1, round((megabytes * 1e6 / 4 - VOCABULARY * HIDDEN) / PARAMETERS_PER_LAYER))
    architecture = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(architecture))


def make_config(model: Path, parallel: ParallelConfig) -> RunConfig:
    """The parts of a run that an actor needs."""
    return RunConfig(
        name="benchmark",
        steps=1000,
        model=ModelConfig(path=str(model), dtype="float32", random_init=True),
        parallel=parallel,
        actor=ActorConfig(max_tokens_per_micro_batch=1024),
        data=DataConfig(source="unused"),
        phases=[PHASE],
    )


def make_objectives() -> Sequence[Objective]:
    """8 random responses in two groups."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (count,), generator=generator).tolist())

    responses = [
        Response(tokens(16), tokens(RESPONSE_TOKENS), (-10.0,) * RESPONSE_TOKENS, float(i % 2), i // 4)
        for i in range(8)
    ]
    experience = build_experience(responses, PHASE.space, ())
    return build_objectives(PHASE, [experience], RESPONSE_TOKENS)


def timed(action: Callable[[], object]) -> float:
    """Duration of an action in seconds, on the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    action()
    return max(gather(time.perf_counter() - started))


def measure(
    store: CheckpointStore, actor: Actor, step: Callable[[], object], state: RunState, seconds: Seconds
) -> None:
    """Measure one save; training continues until the checkpoint is published."""
    started = time.perf_counter()
    blocked = timed(lambda: store.save(state, actor.model.start_save))
    for _ in range(MAX_STEPS_BESIDE):
        if store.has(state.step):
            break
        seconds.steps_beside.append(timed(step))
        blocked += timed(store.poll)
    seconds.published.append(time.perf_counter() - started)
    seconds.blocked.append(blocked + timed(store.finish))


def run(folder: Path, megabytes: float, saves: int, parallel: ParallelConfig) -> tuple[int, float, dict[str, Seconds]]:
    """Return the checkpoint's size in bytes, the duration of an undisturbed step in seconds, and the measurements.
    Collective."""
    if rank() == 0:
        write_model_folder(folder / "model", megabytes)
    dist.barrier()
    config = make_config(folder / "model", parallel)
    actor = build_actor(config, folder / "model")
    objectives = make_objectives()

    def step() -> None:
        actor.update(objectives)

    step()
    undisturbed = statistics.median(timed(step) for _ in range(5))
    results = {"synchronous": Seconds(), "asynchronous": Seconds()}
    stores = {
        name: CheckpointStore(folder / name, 1, None, print, asynchronous=name == "asynchronous") for name in results
    }
    for number in range(1, saves + 1):
        for name, store in stores.items():
            state = RunState(number, PHASE.name, {}, current_layout(parallel), {}, {})
            measure(store, actor, step, state, results[name])
    files = (path for path in (folder / "synchronous").rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files), undisturbed, results


def print_table(nbytes: int, undisturbed: float, results: dict[str, Seconds]) -> None:
    """Medians."""
    console = Console(width=110)
    console.print(
        f"checkpoint of {nbytes / 1e6:.0f} MB, {world_size()} rank(s), {os.cpu_count()} cores; "
        f"a training step without a save takes {undisturbed:.2f} s"
    )
    table = Table("save", "training blocked (s)", "until published (s)", "a step beside it (s)", box=None)
    for name, seconds in results.items():
        beside = f"{statistics.median(seconds.steps_beside):.2f}" if seconds.steps_beside else "-"
        blocked, published = statistics.median(seconds.blocked), statistics.median(seconds.published)
        table.add_row(name, f"{blocked:.2f}", f"{published:.2f}", beside)
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--megabytes", type=float, default=200, help="size of the float32 weights; the checkpoint is 3 times as large"
    )
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind (default: 3)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="use with torchrun")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    silence_expected_warnings()
    parallel = ParallelConfig(tensor_parallel_size=options.tensor_parallel_size)
    initialize_parallel(parallel, seed=0)
    with tempfile.TemporaryDirectory(prefix="checkpoint-benchmark-", dir=options.scratch) as own_folder:
        outcome = run(Path(broadcast(own_folder)), options.megabytes, options.saves, parallel)
        if rank() == 0:
            print_table(*outcome)
        dist.barrier()
    destroy_parallel()


if __name__ == "__main__":
    main()
