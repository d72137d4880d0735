"""Whether two runs came to the same, bit for bit."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_dsrl.rollout.recording import read_groups, rollout_file

NOT_COMPARED = ("seconds", "throughput/", "memory/", "time", "engine/")
"""Beginnings of the names of what depends on the clock, the machine and what befell it."""


def assert_same_run(run: Path, other: Path, steps: int) -> None:
    """Policy, optimizer, rollouts, metrics and evaluations after the same number of steps."""
    assert_same_tensors(load_file(_exported(run, steps)), load_file(_exported(other, steps)))
    assert_same_tensors(checkpoint_tensors(run, steps), checkpoint_tensors(other, steps))
    for step in range(1, steps + 1):
        same = read_groups(rollout_file(run, step)) == read_groups(rollout_file(other, step))
        assert same, f"rollouts of step {step}"
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        assert reproducible(records(run, file)) == reproducible(records(other, file)), file
    assert [record["step"] for record in records(run, "metrics.jsonl")] == list(range(1, steps + 1))


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def checkpoint_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of all models of a checkpoint, optimizers included, independent of the layout that wrote it."""
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
    return [{name: x for name, x in record.items() if not name.startswith(NOT_COMPARED)} for record in records]


def records(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def _tensors(path: str, content: Any):
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
