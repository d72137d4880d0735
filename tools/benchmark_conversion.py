#!/usr/bin/env python3
"""Conversion speed and peak memory, both ways, beside plain copying and Transformers' load + save.

Creates a random Qwen3 of about the requested size in a scratch folder, runs each measurement in its own process, and
prints a table: wall-clock speed without start-up (Python and imports), as the median and the best of several rounds,
also relative to the copy; CPU seconds, which other programs on the machine change less; and peak memory. All output is
fsynced before the clock stops, including the plain copy; all input is in the page cache. The scratch folder is removed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.weights.hf_writer import HfWriter, create_hf_files
from megatron_dsrl.weights.table import weight_table

COPY = ("import os, shutil", "shutil.copytree(SOURCE, TARGET); flush(TARGET)")
TRANSFORMERS = (
    "from megatron_dsrl.platform.engine_process import prepare_engine_process\n"
    "prepare_engine_process()\n"
    "import transformers.models.qwen3.modeling_qwen3\n"
    "from transformers import AutoModelForCausalLM",
    "AutoModelForCausalLM.from_pretrained(SOURCE, dtype='auto').save_pretrained(TARGET); flush(TARGET)",
)
CONVERT_IMPORTS = """
from megatron_dsrl.run.loading import loading_megatron
with loading_megatron():
    import megatron_dsrl.conversion.convert, megatron_dsrl.conversion.convert
    import megatron_dsrl.publishing.card
from megatron_dsrl.cli import main
"""
TO_MEGATRON = (CONVERT_IMPORTS, "assert main(['convert', 'hf-to-megatron', SOURCE, TARGET]) == 0")
TO_HF = (CONVERT_IMPORTS, "assert main(['convert', 'megatron-to-hf', SOURCE, TARGET]) == 0")
"""Imports and work of a process."""
TIMED = """
import json, os, shutil, sys, time

REPORT, SOURCE, TARGET, ROUNDS = sys.argv[1:]
RANK = os.environ.get("RANK", "0")

def read_whole(folder):  # into the page cache, which a conversion writes past
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb", buffering=0) as file:
            while file.read(2**24):
                pass

def flush(folder):
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            os.fsync(file.fileno())

def used():
    with open("/proc/self/status") as file:  # ru_maxrss would include the parent's memory before exec
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return {"time": time.time(), "cpu": sum(os.times()[:4]), "peak": peak}

IMPORTS
rounds = []
for _ in range(int(ROUNDS)):
    if RANK == "0":
        shutil.rmtree(TARGET, ignore_errors=True)
    read_whole(SOURCE)
    before = used()
    WORK
    rounds.append([before, used()])
with open(os.path.join(REPORT, RANK), "w") as file:
    json.dump(rounds, file)
"""


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    name: str
    start_seconds: float
    """Starting Python and importing."""
    seconds: float
    """Median over the rounds, from the last process to begin until the last one to end."""
    best_seconds: float
    cpu_seconds: float
    """User and system time of all its processes: median over the rounds."""
    peak_bytes: int
    """Largest resident memory of a single process."""
    start_bytes: int
    """The same after importing."""


def make_model(folder: Path, gigabytes: float, seed: int = 0) -> int:
    """Write a random bfloat16 Qwen3 of about this size, streamed, in 1 GB files; return its size in bytes.

    Width and vocabulary are those of Qwen3-0.6B, with untied embeddings; the number of layers determines the size.
    """
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    per_layer, outer = 15_730_944, 2 * 151936 * 1024  # elements
    layers = max(2, round((gigabytes * 1e9 / 2 - outer) / per_layer / 2) * 2)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    shapes = weight_table(read_architecture(folder)).hf_shapes()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2**22, generator=generator).mul_(0.02).to(torch.bfloat16)
    with HfWriter(create_hf_files(folder, shapes, torch.bfloat16, 10**9)) as writer:
        for index, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            # One draw, shifted for every tensor: no two tensors are equal, and generation is as fast as the disk.
            values = noise.roll(index + 1).repeat(-(-count // len(noise)))[:count].view(shape)
            writer.write(name, values)
    return sum(torch.Size(shape).numel() * 2 for shape in shapes.values())


def measure(
    name: str,
    parts: tuple[str, str],
    source: Path,
    target: Path,
    rounds: int,
    processes: int = 1,
    cores: int | None = None,
) -> Measurement:
    """Run imports once and the work several times, in separate processes.

    Args:
        cores: how many the processes share; None: all.
    """
    imports, work = parts
    code = TIMED.replace("IMPORTS", imports).replace("WORK", work)
    with tempfile.TemporaryDirectory() as report:
        command = [sys.executable, "-W", "ignore", "-c", code, report, str(source), str(target), str(rounds)]
        started = time.time()
        with only_cores(cores):
            result = subprocess.run(
                command if processes == 1 else several(processes, command),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        if result.returncode:
            raise SystemExit(f"{name} failed:\n{result.stderr}")
        ranks = [json.loads(path.read_text()) for path in Path(report).iterdir()]
    before, after = ([[turn[i] for turn in turns] for turns in zip(*ranks)] for i in (0, 1))  # by round, then rank
    begins, ends = ([max(each["time"] for each in ranks) for ranks in turns] for turns in (before, after))
    cpu = [sum(b["cpu"] - a["cpu"] for a, b in zip(*turns)) for turns in zip(before, after)]
    seconds = [end - begin for begin, end in zip(begins, ends)]
    return Measurement(
        name,
        start_seconds=begins[0] - started,
        seconds=statistics.median(seconds),
        best_seconds=min(seconds),
        cpu_seconds=statistics.median(cpu),
        peak_bytes=max(each["peak"] for each in after[-1]),
        start_bytes=max(each["peak"] for each in before[0]),
    )


@contextmanager
def only_cores(count: int | None) -> Iterator[None]:
    """Processes that are started inside use this many cores; None: all."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def several(processes: int, command: Sequence[str]) -> list[str]:
    """Run a command in several processes, as `--processes` does."""
    launch = f"from megatron_dsrl.run.launch import launch; raise SystemExit(launch({list(command)!r}, {processes}))"
    return [sys.executable, "-c", launch]


def run_all(scratch: Path, processes: int, rounds: int) -> list[Measurement]:
    """Run all measurements. Outputs are removed as soon as they are no longer needed."""
    source, copy, megatron, back = (scratch / name for name in ("hf", "copy", "megatron", "back"))
    measurements = []
    for name, parts in (("copy of the files", COPY), ("Transformers load + save", TRANSFORMERS)):
        measurements.append(measure(name, parts, source, copy, rounds))
        shutil.rmtree(copy)
    names = ["1 process", *(f"{count} processes" for count in range(2, processes + 1))]
    rows: list[tuple[str, int, int | None]] = [(name, count, None) for count, name in enumerate(names, 1)]
    # One process computes on several cores. With a core for each, the table shows what another process gains.
    single = [(f"{name}, {count} {'core' if count == 1 else 'cores'}", count, count) for name, count, _ in rows]
    rows += [row for row in single if row[1] < len(os.sched_getaffinity(0))]
    for name, count, cores in rows:
        measurements.append(measure(f"HF -> Megatron, {name}", TO_MEGATRON, source, megatron, rounds, count, cores))
        measurements.append(measure(f"Megatron -> HF, {name}", TO_HF, megatron, back, rounds, count, cores))
        shutil.rmtree(back)
        shutil.rmtree(megatron)
    return measurements


def print_table(measurements: Sequence[Measurement], model_bytes: int, largest_bytes: int) -> None:
    """Print speeds without program start-up; the first measurement is the copy."""
    console = Console(width=120)
    console.print(
        f"Qwen3, random, bfloat16: {model_bytes / 1e9:.2f} GB, largest tensor {largest_bytes / 1e9:.2f} GB; "
        f"{os.cpu_count()} cores"
    )
    columns = ("", "start-up s", "then s", "best", "GB/s", "of a copy", "best", "CPU s", "peak GB", "above start-up")
    table = Table(*columns, box=None)
    for row in measurements:
        table.add_row(
            row.name,
            f"{row.start_seconds:.1f}",
            f"{row.seconds:.2f}",
            f"{row.best_seconds:.2f}",
            f"{model_bytes / 1e9 / row.seconds:.2f}",
            f"{measurements[0].seconds / row.seconds:.2f}",
            f"{measurements[0].best_seconds / row.best_seconds:.2f}",
            f"{row.cpu_seconds:.2f}",
            f"{row.peak_bytes / 1e9:.2f}",
            f"{(row.peak_bytes - row.start_bytes) / 1e9:.2f}",
        )
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="model size (default: 2)")
    parser.add_argument("--processes", type=int, default=2, help="measure with up to this many (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="conversion-benchmark-", dir=options.scratch) as folder:
        model_bytes = make_model(Path(folder) / "hf", options.gigabytes)
        measurements = run_all(Path(folder), options.processes, options.rounds)
    print_table(measurements, model_bytes, largest_bytes=151936 * 1024 * 2)


if __name__ == "__main__":
    main()
