"""Whether two runs are the same, bit for bit."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_dsrl.rollout.recording import read_groups, rollout_file

NOT_COMPARED = {
    "seconds": "depends on the clock",
    "throughput/": "depends on the clock",
    "time": "is the clock",
    "memory/": "depends on how long the process has lived and what else it did",
    "engine/": "counts restarts of engines and repeated requests, which is what the interruption was",
}
"""Beginnings of names in records that are not compared, and why."""


def assert_same_run(run: Path, other: Path, steps: int) -> None:
    """Policy, optimizer, rollouts, metrics and evaluations after the same number of steps."""
    assert differences(run, other, steps) == []


def differences(run: Path, other: Path, steps: int) -> list[str]:
    """What differs after the same number of steps: policy, optimizer, rollouts, metrics, evaluations."""
    exported = _different_tensors(load_file(_exported(run, steps)), load_file(_exported(other, steps)))
    saved = _different_tensors(checkpoint_tensors(run, steps), checkpoint_tensors(other, steps))
    found = [f"exported policy: {name}" for name in exported] + [f"checkpoint: {name}" for name in saved]
    for step in range(1, steps + 1):
        if read_groups(rollout_file(run, step)) != read_groups(rollout_file(other, step)):
            found.append(f"rollouts of step {step}")
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        found += different_records(file, records(run, file), records(other, file))
    if [record["step"] for record in records(run)] != list(range(1, steps + 1)):
        found.append(f"metrics.jsonl: steps 1 to {steps}, each once, are expected in {run}")
    return found


def different_records(file: str, ones: list[dict], others: list[dict]) -> list[str]:
    """Fields that differ, apart from those in `NOT_COMPARED`."""
    if len(ones) != len(others):
        return [f"{file}: {len(ones)} and {len(others)} records"]
    return [
        f"{file}, step {one.get('step')}: {name} is {one.get(name)!r} and {other.get(name)!r}"
        for one, other in zip(reproducible(ones), reproducible(others))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one and _different_tensors(one, other) == []


def _different_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that differ in a bit, or that only one of them has."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name not in one or name not in other or not torch.equal(one[name], other[name])]


def checkpoint_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of all models of a checkpoint, including optimizers, independent of the layout that wrote it."""
    tensors: dict[str, torch.Tensor] = {}
    for folder in (run / "checkpoints" / f"step_{step:06d}").glob("*/"):
        if not (folder / ".metadata").exists():
            continue  # what partial rollouts have left
        content: dict[str, Any] = {}
        _load_state_dict(
            content, storage_reader=FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True
        )
        tensors |= _tensors(folder.name, content)
    assert any("exp_avg_sq" in name for name in tensors), sorted(tensors)
    return tensors


def reproducible(records: list[dict]) -> list[dict]:
    """The records without what depends on the clock and the machine."""
    return [{name: x for name, x in record.items() if not name.startswith(tuple(NOT_COMPARED))} for record in records]


def records(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def _tensors(path: str, content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, io.BytesIO):
        content.seek(0)
        content = torch.load(content, weights_only=False)
    if isinstance(content, torch.Tensor):
        yield path, content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from _tensors(f"{path}/{name}", value)
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            yield from _tensors(f"{path}/{number}", value)


def _exported(run: Path, step: int) -> Path:
    return run / "hf" / f"step_{step:06d}" / "model.safetensors"
