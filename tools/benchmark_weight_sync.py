#!/usr/bin/env python3
"""Time to transfer the trainer's weights to an SGLang engine: in flattened buckets, and through the disk.

For every model size, a random Qwen3 is sharded over the processes with Megatron and engines are started as in a run.
The first push, after which digests of all weights are compared, is timed alone. Each round then times the push with
every bucket size, and an fsynced safetensors export that every engine loads with `/update_weights_from_disk`, most
likely from the page cache. Use torchrun for several ranks. The table shows medians over the rounds.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.common.collective import broadcast, gather, rank, together, world_size
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.rollout import EngineConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import DTYPES, build_model
from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel
from megatron_dsrl.platform import silence_expected_warnings
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.engine_group import EngineGroup
from megatron_dsrl.weights.export import export_hf_folder
from megatron_dsrl.weights.load import fill_with_random_weights
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import weight_table

VOCABULARY, HEAD = 32_000, 64
TIMEOUT_SECONDS = 600.0
WRITE, LOAD = "disk: write", "disk: load"
CHECKED = "first push, digests compared"


def write_model_folder(folder: Path, megabytes: float, hidden: int, dtype: str) -> None:
    """Write config.json of a Qwen3 of this width whose weights have about this size."""
    parameters = megabytes * 1e6 / DTYPES[dtype].itemsize
    architecture = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": max(1, round((parameters - VOCABULARY * hidden) / (16 * hidden * hidden))),
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD,
        "head_dim": HEAD,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(architecture))


def make_config(model: Path, parallel: ParallelConfig, engine_size: int, dtype: str) -> RunConfig:
    """The parts of a run that engines and a model need."""
    return RunConfig(
        name="benchmark",
        steps=1,
        model=ModelConfig(path=str(model), dtype=dtype, random_init=True),
        parallel=parallel,
        data=DataConfig(source="unused", max_prompt_tokens=64),
        rollout={"max_response_tokens": 64},
        engine=EngineConfig(
            tensor_parallel_size=engine_size,
            max_total_tokens=4096,
            update_timeout_seconds=TIMEOUT_SECONDS,
            check_weights="first",  # verify that the timed weights arrive
        ),
        phases=[PhaseConfig(name="GRPO", space=PostTrain(), advantage={"name": "group_standardised"})],
    )


def seconds_of(action: Callable[[], object]) -> float:
    """Duration of an action in seconds, on the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    action()
    return max(gather(time.perf_counter() - started))


def load_from_disk(engine: EngineAddress, folder: Path) -> None:
    """Make an engine load a folder; raise if it cannot."""
    request = urllib.request.Request(
        f"{engine.url}/update_weights_from_disk",
        json.dumps({"model_path": str(folder), "load_format": "auto"}).encode(),
        {"Content-Type": "application/json"} | engine.headers,
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_SECONDS) as answer:
        assert json.load(answer)["success"]


Counts = dict[str, tuple[int, int]]
"""Buckets and tensors by the name of a push."""


def measure(
    folder: Path, config: RunConfig, bucket_megabytes: Sequence[int], rounds: int
) -> tuple[dict[str, list[float]], Counts]:
    """Seconds of each method, one value per round without the first, which warms up; and what it sends. Collective."""
    model_folder = Path(config.model.path)
    architecture, dtype = read_architecture(model_folder), DTYPES[config.model.dtype]
    table = weight_table(architecture)
    chunks = build_model(architecture, config.model, config.parallel)
    fill_with_random_weights(chunks, table, architecture.initializer_range, seed=0)
    initial = folder / "initial"  # the engines start from it, as in a run
    export_hf_folder(chunks, table, model_folder, initial, dtype)
    engines = EngineGroup(config.with_fields("model", path=str(initial), random_init=False), folder)
    seconds: dict[str, list[float]] = {}
    counts: Counts = {}
    try:
        engines.start()
        engines.wait_until_ready()
        size = config.engine.tensor_parallel_size
        mine = [address for owner, address in enumerate(engines.addresses) if owner * size == rank()]
        for turn in range(rounds + 1):
            measured = {}
            for megabytes in bucket_megabytes:
                name = f"push, {megabytes} MiB buckets"

                def stream(megabytes: int = megabytes, name: str = name) -> Iterator[list[tuple[str, Tensor]]]:
                    counts[name] = (0, 0)
                    for bucket in stream_hf_weights(chunks, table, megabytes * 2**20, dtype):
                        counts[name] = (counts[name][0] + 1, counts[name][1] + len(bucket))
                        yield bucket

                taken = seconds_of(lambda: engines.load(stream, turn))
                if not seconds:
                    seconds[CHECKED], counts[CHECKED] = [taken], counts[name]
                measured[name] = taken
            target = folder / f"export_{turn}"
            measured[WRITE] = seconds_of(lambda: export_hf_folder(chunks, table, model_folder, target, dtype))
            measured[LOAD] = seconds_of(lambda: together(lambda: [load_from_disk(engine, target) for engine in mine]))
            for way, value in measured.items() if turn else ():
                seconds.setdefault(way, []).append(value)
    finally:
        engines.close()
    return seconds, counts


def print_table(megabytes: float, seconds: dict[str, list[float]], counts: Counts) -> None:
    """Print medians; the ratios compare with a copy in memory, and with writing plus loading through the disk."""
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    disk = medians.pop(WRITE) + medians.pop(LOAD)
    columns = ("seconds", "best", "GB/s", "of a copy", "disk / this", "buckets", "tensors")
    table = Table(f"{megabytes:.0f} MB", *columns, box=None, title_justify="left")
    parts = f"disk: write {statistics.median(seconds[WRITE]):.2f} + load {statistics.median(seconds[LOAD]):.2f}"
    copy = megabytes / 1e3 / memory_copy_speed(megabytes)
    for way, value in {**medians, parts: disk}.items():
        best = f"{min(seconds[way]):.2f}" if way in seconds else ""
        sent = [str(count) for count in counts.get(way, ())]
        speeds = (f"{megabytes / 1e3 / value:.2f}", f"{copy / value:.2f}", f"{disk / value:.1f}")
        table.add_row(way, f"{value:.2f}", best, *speeds, *sent)
    table.add_row("one copy in CPU memory", f"{copy:.2f}", "", f"{megabytes / 1e3 / copy:.2f}", "1.00")
    Console(width=120).print(table)


def memory_copy_speed(megabytes: float) -> float:
    """GB/s of copying as many bytes within this process, in pieces of at most 256 MB."""
    source = torch.ones(int(min(megabytes, 256) * 1e6), dtype=torch.uint8)
    target = source.clone()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - begin)
    return len(source) / 1e9 / min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[100, 400], help="sizes of the weights")
    parser.add_argument("--bucket-megabytes", type=int, nargs="+", default=[16, 64, 256], help="sizes of the buckets")
    parser.add_argument("--hidden-size", type=int, default=512, help="of the model; layers make up the size")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="of the trainer; use with torchrun")
    parser.add_argument("--engine-tensor-parallel-size", type=int, default=1, help="use with torchrun")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    silence_expected_warnings()
    parallel = ParallelConfig(tensor_parallel_size=options.tensor_parallel_size)
    initialize_parallel(parallel, seed=0)
    if rank() == 0:
        print(f"{world_size()} rank(s), {os.cpu_count()} cores, {options.dtype}", flush=True)
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory(prefix="weight-sync-", dir=options.scratch) as own_folder:
            folder = Path(broadcast(own_folder))
            if rank() == 0:
                write_model_folder(folder / "model", megabytes, options.hidden_size, options.dtype)
            dist.barrier()
            config = make_config(folder / "model", parallel, options.engine_tensor_parallel_size, options.dtype)
            seconds, counts = measure(folder, config, options.bucket_megabytes, options.rounds)
            size = sum(path.stat().st_size for path in (folder / "initial").glob("*.safetensors"))
            if rank() == 0:
                print_table(size / 1e6, seconds, counts)
            dist.barrier()
    destroy_parallel()


if __name__ == "__main__":
    main()
