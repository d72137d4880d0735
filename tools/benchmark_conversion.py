#!/usr/bin/env python3
"""Conversion speed and peak memory, both ways, beside plain copying and Transformers' load + save.

Creates a random Qwen3 of about the requested size in a scratch folder, runs each measurement in its own process, and
prints a table: wall-clock speed, CPU seconds (which other programs on the machine hardly change), and peak memory. A
dash stands for a speed that start-up hides, as for a small model. All output is fsynced before the clock stops,
including the plain copy; all input is in the page cache. The scratch folder is removed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.weights.hf_writer import HfWriter, create_hf_files
from megatron_dsrl.weights.tables import weight_table

CONVERT = [sys.executable, "-m", "megatron_dsrl.cli", "convert"]
COPY = """
import os, shutil, sys
shutil.copytree(sys.argv[1], sys.argv[2])
for name in os.listdir(sys.argv[2]):
    with open(os.path.join(sys.argv[2], name), "rb") as file:
        os.fsync(file.fileno())
"""
TRANSFORMERS = """
import os, sys
from megatron_dsrl.platform.engine import prepare_engine_process
prepare_engine_process()
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
for name in os.listdir(sys.argv[2]):
    with open(os.path.join(sys.argv[2], name), "rb") as file:
        os.fsync(file.fileno())
"""


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    name: str
    seconds: float
    start_seconds: float
    """The part spent on starting Python and importing, measured with a process that does only that."""
    cpu_seconds: float
    """User and system time of all its processes, without that of starting."""
    peak_bytes: int
    """Largest resident memory of a single process."""
    start_bytes: int
    """The same for the process that only starts."""


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


def measure(name: str, command: Sequence[str], empty: Sequence[str]) -> Measurement:
    """Run a command and its empty counterpart, each in its own process."""
    start_seconds, start_cpu, start_bytes = _run(empty)
    seconds, cpu, peak = _run(command)
    return Measurement(name, seconds, start_seconds, max(cpu - start_cpu, 0.0), peak, start_bytes)


def _run(command: Sequence[str]) -> tuple[float, float, int]:
    """Wall-clock seconds, CPU seconds of all processes, and peak resident bytes of the largest."""
    with tempfile.NamedTemporaryFile("r", suffix=".peak") as peak_file:
        # Each measurement has its own wrapper process, so that RUSAGE_CHILDREN covers this command alone.
        wrapper = (
            "import resource, subprocess, sys; code = subprocess.call(sys.argv[2:], stdout=subprocess.DEVNULL); "
            "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
            "open(sys.argv[1], 'w').write(f'{used.ru_utime + used.ru_stime} {used.ru_maxrss}'); sys.exit(code)"
        )
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", wrapper, peak_file.name, *command], stderr=subprocess.PIPE, text=True
        )
        seconds = time.perf_counter() - started
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
        cpu, kibibytes = peak_file.read().split()
        return seconds, float(cpu), int(kibibytes) * 1024


def torchrun(processes: int, command: Sequence[str]) -> list[str]:
    """Command that runs `python -m ...` or `python -c ...` in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "--no-python", *command]


def run_all(scratch: Path, processes: int) -> list[Measurement]:
    """Run all measurements. Outputs are removed as soon as they are no longer needed."""
    source = scratch / "hf"
    python = [sys.executable, "-c"]
    empty_convert = [*python, "import megatron_dsrl.conversion.hf_to_megatron, megatron_dsrl.conversion.megatron_to_hf"]
    measurements = []

    def add(name: str, command: Sequence[str], empty: Sequence[str], output: Path, keep: bool = False) -> None:
        measurements.append(measure(name, command, empty))
        if not keep:
            shutil.rmtree(output)

    copy, megatron, back = scratch / "copy", scratch / "megatron", scratch / "back"
    add("copy of the files", [*python, COPY, str(source), str(copy)], [*python, ""], copy)
    add(
        "Transformers load + save",
        [*python, TRANSFORMERS, str(source), str(copy)],
        [*python, TRANSFORMERS.split("AutoModelForCausalLM.from_pretrained")[0]],
        copy,
    )
    to_megatron = [*CONVERT, "hf-to-megatron", str(source)]
    to_hf = [*CONVERT, "megatron-to-hf", str(megatron)]
    add("HF -> Megatron, 1 process", [*to_megatron, str(megatron)], empty_convert, megatron, keep=True)
    add("Megatron -> HF, 1 process", [*to_hf, str(back)], empty_convert, back)
    if processes > 1:
        shutil.rmtree(megatron)
        name = f"{processes} processes"
        empty = torchrun(processes, empty_convert)
        add(f"HF -> Megatron, {name}", torchrun(processes, [*to_megatron, str(megatron)]), empty, megatron, keep=True)
        add(f"Megatron -> HF, {name}", torchrun(processes, [*to_hf, str(back)]), empty, back)
    return measurements


def print_table(measurements: Sequence[Measurement], model_bytes: int, largest_bytes: int) -> None:
    """Print speeds relative to the model's size, with and without program start-up."""
    console = Console(width=110)
    console.print(
        f"Qwen3, random, bfloat16: {model_bytes / 1e9:.2f} GB, largest tensor {largest_bytes / 1e9:.2f} GB; "
        f"{os.cpu_count()} cores"
    )
    columns = ("", "seconds", "start-up", "GB/s after it", "CPU s after it", "peak GB", "start-up", "above it")
    table = Table(*columns, box=None)
    for row in measurements:
        table.add_row(
            row.name,
            f"{row.seconds:.1f}",
            f"{row.start_seconds:.1f}",
            _speed(row, model_bytes),
            f"{row.cpu_seconds:.1f}",
            f"{row.peak_bytes / 1e9:.2f}",
            f"{row.start_bytes / 1e9:.2f}",
            f"{(row.peak_bytes - row.start_bytes) / 1e9:.2f}",
        )
    console.print(table)


def _speed(row: Measurement, model_bytes: int) -> str:
    """GB/s without start-up; a dash if it took less than a quarter of the start-up, which varies by about that much."""
    work = row.seconds - row.start_seconds
    return f"{model_bytes / 1e9 / work:.2f}" if work > row.start_seconds / 4 else "-"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="model size (default: 2)")
    parser.add_argument("--processes", type=int, default=2, help="also measure with this many processes (default: 2)")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="conversion-benchmark-", dir=options.scratch) as folder:
        model_bytes = make_model(Path(folder) / "hf", options.gigabytes)
        measurements = run_all(Path(folder), options.processes)
    print_table(measurements, model_bytes, largest_bytes=151936 * 1024 * 2)


if __name__ == "__main__":
    main()
