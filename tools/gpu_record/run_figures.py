"""Speeds of a finished run, from its metrics."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.observability.records import Record, read_records
from megatron_dsrl.planning.compute import training_flops
from megatron_dsrl.planning.gpus import Gpu
from megatron_dsrl.rollout.recording import read_groups, rollout_file
from tools.gpu_record.planned import utilisation


def speeds(
    run_folder: Path, architecture: Architecture, weight_bytes: int, gpu: Gpu | None, gpus: int = 1
) -> dict[str, str]:
    """Metrics of a run, medians over all steps but the first.

    Args:
        run_folder: folder of the run.
        architecture: of its model.
        weight_bytes: size of the whole model, as it is pushed.
        gpu: what it ran on, for the share of its peak; None if its peak is unknown.
        gpus: how many of them.
    """
    records = [record for record in read_records(run_folder / "metrics.jsonl") if record["step"] > 1]
    trained, flops = zip(*(_work_of_step(run_folder, record["step"], architecture) for record in records))
    # In this part of the step the engine gives the device to the trainer, which is not the actor's work.
    switching = ("memory/engine_sleep_seconds", "memory/onload_seconds")
    waiting = [sum(record.get(key, 0.0) for key in switching) for record in records]
    seconds = statistics.median(record["seconds/train"] - wait for record, wait in zip(records, waiting))
    work_per_second = statistics.median(flops) / seconds / gpus
    push = _median(records, "memory/load_weights_seconds")
    figures = {
        "actor, tokens/s (of prompts and responses)": f"{statistics.median(trained) / seconds:,.0f}",
        "actor, TFLOP/s per GPU": f"{work_per_second / 1e12:.3g}",
        "actor, MFU": utilisation(work_per_second, gpu),
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
