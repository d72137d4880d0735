#!/usr/bin/env python3
"""Seconds of generation and of the update with 1 and 2 threads, for Qwen3 models of 0.9, 20 and 107 million parameters.

    python tools/benchmark_threads.py --models 20M

common/cpu_threads.py bases its choice by model size on this. Runs with different numbers of threads take their steps in
turns, one computing while the others are suspended: 4 x 8 responses of 128 tokens. Times are wall-clock: run it on a
machine without other work.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmark_against_trl import WARM_UP_STEPS, Run, started
from rich.console import Console
from rich.table import Table
from trl_comparison_tasks import RANDOM_MODEL, REPOSITORY, TASKS, write_configuration, write_random_task

MODELS = {
    "0.9M": {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "20M": {"vocab_size": 8000, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 10,
            "num_attention_heads": 6, "num_key_value_heads": 2},
    "107M": {},
}  # fmt: skip
"""Differences from the model of `benchmark_against_trl.py --task random`."""


def run_with(threads: int, config_file: Path, folder: Path) -> Run:
    """A training with this many threads for trainer and engine."""
    name = f"threads_{threads}"
    settings = [f"name={name}", f"actor.cpu_threads={threads}", f"engine.cpu_threads={threads}"]
    return Run(
        f"{threads} thread(s)",
        [sys.executable, "-m", "megatron_dsrl.cli", "train", str(config_file), *settings],
        {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tools'}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"},
        folder / "runs" / name / "metrics.jsonl",
        "reward/mean",
        folder / f"{name}.log",
    )


def update_seconds(run: Run) -> list[float]:
    """Seconds of the update in each measured step. A run is never suspended during its update, so they are right."""
    records = map(json.loads, run.records.read_text().splitlines())
    return [record["seconds/train"] for record in records][WARM_UP_STEPS:]


def measure(model: str, threads: list[int], steps: int, table: Table) -> None:
    """Add a row per number of threads."""
    with tempfile.TemporaryDirectory(prefix="threads-") as name:
        folder = Path(name)
        changes = write_random_task(folder, RANDOM_MODEL | MODELS[model])
        config_file = write_configuration(folder, TASKS["random"], "float32", changes)
        runs = [run_with(count, config_file, folder) for count in threads]
        with started(runs):
            for _ in range(steps):
                for run in runs:
                    run.step()
            for run in runs:
                update = statistics.median(update_seconds(run))
                rest = statistics.median(run.seconds) - update
                table.add_row(model, run.name, f"{rest:.2f}", f"{update:.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=4, help="measured, after two of warm-up (default: 4)")
    options = parser.parse_args()
    table = Table("parameters", "", "generation and the rest, s", "update, s", box=None)
    for model in options.models:
        measure(model, options.threads, options.steps, table)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
