#!/usr/bin/env python3
"""Run every check and benchmark that fits on one GPU, with random weights, and write a Markdown record.

    python -m tools.gpu_record --size 1.7b --output gpu_record.md

A real run of a few steps (engine, trainer, weight push, offload) gives the speeds, and its memory is shown beside the
prediction of `dsrl plan`. Then come `dsrl doctor`, the tests marked `gpu` and the benchmarks in tools/. Each part runs
in its own process with a time limit. If a part fails, the record contains the end of its output, and the exit status is
1. `--size tiny` tries out the script on a CPU; the record then says that its numbers are not about GPUs.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE, build_tokenizer
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.yaml_text import format_yaml
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.observability.records import Record, read_records
from megatron_dsrl.planning.compute import training_flops
from megatron_dsrl.planning.fit import RESERVE_BYTES, run_memory
from megatron_dsrl.planning.gpus import GPUS, Gpu
from megatron_dsrl.planning.parameters import parameters_of_model
from megatron_dsrl.platform.devices import DeviceInventory, take_inventory
from megatron_dsrl.rollout.recording import read_groups, rollout_file

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
STEPS = 4
"""The first step warms up and is not counted."""
PACKAGES = (
    "torch", "megatron-core", "sglang", "sglang-kernel", "transformer-engine-torch", "flash-attn", "transformers",
)  # fmt: skip


ENGINE_SETTINGS = (
    "attention_backend", "prefill_attention_backend", "decode_attention_backend", "sampling_backend",
    "disable_cuda_graph", "dtype", "kv_cache_dtype", "max_total_num_tokens",
    "max_running_requests", "mem_fraction_static", "chunked_prefill_size",
)  # fmt: skip
"""Fields of SGLang's /server_info."""


@dataclass(frozen=True)
class Size:
    """A model and a run that one device can do."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    prompts: int
    samples: int
    response_tokens: int
    micro_batch_tokens: int
    part_limit_seconds: float


SIZES = {
    "tiny": Size(64, 192, 2, 4, 2, 16, VOCAB_SIZE, 4, 4, 24, 512, 600),
    # Qwen3-0.6B and Qwen3-1.7B, each of which fits an 80 GB GPU by `dsrl plan`.
    "0.6b": Size(1024, 3072, 28, 16, 8, 128, 151_936, 32, 8, 2048, 16_384, 1800),
    "1.7b": Size(2048, 6144, 28, 16, 8, 128, 151_936, 32, 8, 2048, 8192, 3600),
}
BENCHMARKS = {
    "benchmark_log_probs.py": {"tiny": "--tokens 128 --vocabulary 2048 --repetitions 1", "": "--hidden-size 2048"},
    "benchmark_on_policy.py": {
        "tiny": "--layers 1 --samples 4 --repetitions 1",
        "": "--layers 8 --hidden-size 2048 --vocabulary 151936 --response-tokens 1024 --dtype bfloat16",
    },
    "benchmark_weight_sync.py": {
        "tiny": "--megabytes 40 --bucket-megabytes 16 --rounds 1 --dtype float32",
        "": "--megabytes 1000 4000 --hidden-size 2048 --bucket-megabytes 64 256 1024",
    },
    "benchmark_checkpoint.py": {"tiny": "--megabytes 40 --saves 1", "": "--megabytes 2000 --saves 2"},
}
"""By file: arguments for the tiny size and for the others."""


def checksum_parity(response: str, answer: str) -> float:
    """A reward that differs between the responses to one prompt, even those of a random model."""
    return float(zlib.crc32(response.encode()) % 2)


def write_run(folder: Path, size: Size, on_gpu: bool, port: int) -> Path:
    """Write a model folder without weights, prompts, and a configuration with an engine on this port; return the
    configuration file."""
    model = folder / "model"
    build_tokenizer().save_pretrained(model)
    architecture = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": size.vocabulary,
        "hidden_size": size.hidden, "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.groups, "head_dim": size.head,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "initializer_range": 0.02, "torch_dtype": "bfloat16" if on_gpu else "float32",
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(architecture))
    problems = [{"problem": f"{number}+{number}=?", "answer": str(2 * number)} for number in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    run = {
        "name": "run",
        "output_dir": str(folder),
        "steps": STEPS,
        "model": {"path": str(model), "random_init": True, "dtype": "bfloat16" if on_gpu else "float32"},
        "data": {"source": str(folder / "prompts.jsonl"), "system_prompt": None, "max_prompt_tokens": 64},
        "reward": {"function": "tools.gpu_record:checksum_parity", "workers": 1},
        "rollout": {
            "prompts_per_step": size.prompts,
            "samples_per_prompt": size.samples,
            "max_response_tokens": size.response_tokens,
        },
        "engine": {"port": port} | ({"memory_fraction": 0.4} if on_gpu else {"max_total_tokens": 8192}),
        "actor": {
            "max_tokens_per_micro_batch": size.micro_batch_tokens,
            "offload": {"gradients": True, "optimizer": True, "parameters": True},  # so that its switches are measured
        },
        "phases": [{"name": "GRPO", "space": {"name": "post_train"}, "advantage": {"name": "group_standardised"}}],
    }
    file = folder / "run.yaml"
    file.write_text(format_yaml(run))
    return file


@dataclass(frozen=True)
class Outcome:
    """Result of one part."""

    command: str
    status: int
    """Exit status of its process; 124 if it hit its time limit."""
    seconds: float
    output: str
    """Its stdout; after a failure also its stderr."""


def run_part(command: Sequence[str], limit_seconds: float) -> Outcome:
    """Run a command from the repository, and never raise."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, text=True, timeout=limit_seconds, capture_output=True
        )
        status, output = done.returncode, done.stdout + (done.stderr if done.returncode else "")
    except subprocess.TimeoutExpired as error:
        status, output = 124, f"{(error.stdout or b'').decode(errors='replace')}\nstopped after {limit_seconds:g} s"
    return Outcome(" ".join(command), status, time.perf_counter() - started, output)


class AskedInThread:
    """Polls in a thread while the body of the `with` runs."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        raise NotImplementedError


class DeviceMemory(AskedInThread):
    """Peak GPU memory of all processes together, according to nvidia-smi."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_mebibytes = 0

    @property
    def shown(self) -> dict[str, str]:
        """Empty if nvidia-smi does not answer."""
        name = "device, peak memory of all processes, GiB"
        return {name: f"{self.peak_mebibytes / 1024:.2f}"} if self.peak_mebibytes else {}

    def _ask(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._ended.wait(0.5):
            try:
                answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
                self.peak_mebibytes = max(self.peak_mebibytes, *map(int, answer.split()))
            except (OSError, ValueError, subprocess.SubprocessError):
                return


class EngineSettings(AskedInThread):
    """The settings that the engine of a running run reports. Polls until it answers."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.answer: dict[str, Any] = {}
        self._url = f"http://127.0.0.1:{port}/server_info"

    @property
    def shown(self) -> dict[str, str]:
        """The settings that affect speed, as chosen by SGLang."""
        settings = {f"engine, {key}": str(self.answer[key]) for key in ENGINE_SETTINGS if key in self.answer}
        for passes, graphs in (self.answer.get("cuda_graph_config") or {}).items():
            settings[f"engine, CUDA graphs, {passes}"] = f"{graphs['backend']}, batches up to {graphs['max_bs']}"
        return settings

    def _ask(self) -> None:
        while not self.answer and not self._ended.wait(0.5):
            try:
                with urllib.request.urlopen(self._url, timeout=5) as reply:
                    self.answer = json.load(reply)
            except (OSError, ValueError):
                pass  # not there yet


def free_port() -> int:
    """A port that is free on loopback right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def speeds(run_folder: Path, architecture: Architecture, weight_bytes: int, gpu: Gpu | None) -> dict[str, str]:
    """Metrics of a run, medians over all steps but the first.

    Args:
        run_folder: of the run.
        architecture: of its model.
        weight_bytes: of the whole model, as it is pushed.
        gpu: what it ran on, for the share of its peak; None where that is not known.
    """
    records = [record for record in read_records(run_folder / "metrics.jsonl") if record["step"] > 1]
    trained, flops = zip(*(_work_of_step(run_folder, record["step"], architecture) for record in records))
    # In this part the engine gives the device to the trainer, which is none of the actor's work.
    of_switches = ("memory/engine_sleep_seconds", "memory/onload_seconds")
    waiting = [sum(record.get(key, 0.0) for key in of_switches) for record in records]
    seconds = statistics.median(record["seconds/train"] - wait for record, wait in zip(records, waiting))
    work_per_second = statistics.median(flops) / seconds
    push = _median(records, "memory/load_weights_seconds")
    mfu = f"{work_per_second / gpu.flops:.1%} of {gpu.flops / 1e12:.0f} TFLOP/s" if gpu else "no peak known"
    figures = {
        "actor, tokens/s (of prompts and responses)": f"{statistics.median(trained) / seconds:,.0f}",
        "actor, TFLOP/s": f"{work_per_second / 1e12:.3g}",
        "actor, MFU": mfu,
        "engine, tokens/s": f"{_median(records, 'throughput/tokens_per_second'):,.0f}",
        "weight push, GB/s": f"{weight_bytes / push / 1e9:.3g}",
        "trainer, peak memory, GiB": f"{max(record['memory/trainer_peak_gib'] for record in records):.2f}",
        "log-prob gap, trainer - engine, mean": f"{_median(records, 'mismatch/mean_log_prob_gap'):.2e}",
    }
    switches = _keys(records, "memory/", "_seconds")
    figures["all switches between engine and trainer, s"] = f"{sum(_median(records, key) for key in switches):.3g}"
    for key in switches:
        name = key.removeprefix("memory/").removesuffix("_seconds")
        figures[f"switch: {name}, s"] = f"{_median(records, key):.3g}"
    for key in _keys(records, "memory/", "_moved_gib"):
        name = key.removeprefix("memory/").removesuffix("_moved_gib")
        figures[f"switch: {name}, moved, GiB"] = f"{_median(records, key):.3g}"
    for key in _keys(records, "seconds/"):
        figures[f"part of the step: {key.removeprefix('seconds/')}, s"] = f"{_median(records, key):.3g}"
    return figures


def planned_memory(run: Path, model: Path, gpu: Gpu | None) -> dict[str, str]:
    """Memory peaks predicted by `dsrl plan`, for comparison with the measured ones; empty for an unknown GPU."""
    if gpu is None:
        return {}
    memory = run_memory(load_config(run, []), read_architecture(model), gpu.memory_bytes, world_size=1)
    trainer = memory.peak_update - memory.engine_released - RESERVE_BYTES
    figures = {"trainer, planned peak, GiB": f"{trainer / GIB:.2f}"}
    peaks = {f"device, planned peak of {what}, GiB": f"{peak / GIB:.2f}" for what, peak in memory.peaks.items()}
    return figures | peaks


def _keys(records: Sequence[Record], beginning: str, end: str = "") -> list[str]:
    """Keys of any of the records, sorted."""
    return sorted({key for record in records for key in record if key.startswith(beginning) and key.endswith(end)})


def _work_of_step(run_folder: Path, step: int, architecture: Architecture) -> tuple[int, float]:
    """Number of tokens that the trainer processed, and its floating-point operations."""
    pairs = [
        (len(group.prompt.token_ids), len(sample.response_ids))
        for group in read_groups(rollout_file(run_folder, step))
        for sample in group.samples
    ]
    tokens = sum(map(sum, pairs))
    return tokens, sum(training_flops(architecture, *pair, recompute="none") for pair in pairs)


def _median(records: Sequence[Record], key: str) -> float:
    return statistics.median(record[key] for record in records if record.get(key) is not None)


def known_gpu(names: Sequence[str]) -> Gpu | None:
    """The entry of the planning table for a device name such as `NVIDIA H100 80GB HBM3`."""
    words = {word.lower() for name in names for word in name.replace("-", " ").split()}
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def header(size: str, devices: DeviceInventory) -> list[str]:
    """Heading: device, commit, size and package versions."""
    commit = _git("rev-parse", "HEAD") or "unknown"
    changed = " with changes that are not committed" if _git("status", "--porcelain", "--untracked-files=no") else ""
    lines = ["# Record of one device", ""]
    if devices.platform == "cpu":
        lines += ["**This ran on a CPU. It tries out the script and says nothing about GPUs.**", ""]
    lines += [
        f"- device: {', '.join(devices.names) or 'CPU'}; CUDA {devices.torch_cuda_version or 'none'}",
        f"- commit: {commit}{changed}",
        f"- size: {size}, random weights",
        f"- time: {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
    ]
    return lines + [f"- {name}: {_installed(name)}" for name in PACKAGES] + [""]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    shown = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return shown.stdout.strip()


def part_lines(title: str, outcome: Outcome, last_lines: int) -> list[str]:
    """A section with what a part printed last."""
    verdict = "passed" if outcome.status == 0 else f"FAILED with status {outcome.status}"
    shown = outcome.output.strip().splitlines()[-last_lines:]
    return [f"## {title}", "", f"`{outcome.command}`: {verdict}, {outcome.seconds:.0f} s", "", "```", *shown, "```", ""]


def make_record(size_name: str, with_tests: bool, benchmarks: Sequence[str]) -> tuple[str, bool]:
    """The record, and whether every part went well."""
    size, devices = SIZES[size_name], take_inventory()
    on_gpu = devices.platform == "cuda"
    lines, outcomes = header(size_name, devices), []
    with tempfile.TemporaryDirectory(prefix="gpu-record-") as name:
        folder = Path(name)
        port = free_port()
        run = write_run(folder, size, on_gpu, port)
        with EngineSettings(port) as engine, DeviceMemory() as device:
            outcomes.append(run_part(["-m", "megatron_dsrl.cli", "train", str(run)], size.part_limit_seconds))
        lines += ["## A run of a few steps", ""]
        if outcomes[-1].status == 0:
            architecture = read_architecture(folder / "model")
            weight_bytes = parameters_of_model(architecture) * (2 if on_gpu else 4)
            gpu = known_gpu(devices.names)
            figures = speeds(folder / "run", architecture, weight_bytes, gpu)
            figures |= device.shown | planned_memory(run, folder / "model", gpu)
            said = next(line for line in outcomes[-1].output.splitlines() if line.startswith("trainer: "))
            rows = [f"| {figure} | {value} |" for figure, value in (figures | engine.shown).items()]
            lines += [said, "", "| figure | median, or setting |", "|---|---|", *rows, ""]
        else:
            lines += part_lines("The run", outcomes[-1], last_lines=40)
    outcomes.append(run_part(["-m", "megatron_dsrl.cli", "doctor"], size.part_limit_seconds))
    lines += part_lines("dsrl doctor", outcomes[-1], last_lines=60)
    if with_tests:
        command = ["-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "tests"]
        outcomes.append(run_part(command, size.part_limit_seconds))
        lines += part_lines("Tests marked `gpu`", outcomes[-1], last_lines=15)
    for file in benchmarks:
        arguments = BENCHMARKS[file].get(size_name, BENCHMARKS[file][""])
        outcomes.append(run_part([f"tools/{file}", *arguments.split()], size.part_limit_seconds))
        lines += part_lines(file, outcomes[-1], last_lines=25)
    return "\n".join(lines), all(outcome.status == 0 for outcome in outcomes)


def main(arguments: Any = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.7b", help="model and run (default: 1.7b)")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--without-tests", action="store_true", help="leave out the tests marked `gpu`")
    parser.add_argument("--benchmarks", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS), help="default: all")
    options = parser.parse_args(arguments)
    record, all_well = make_record(options.size, not options.without_tests, options.benchmarks)
    options.output.write_text(record, encoding="utf-8")
    print(options.output)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
