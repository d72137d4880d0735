"""A run's checkpoints on disk:

    <run folder>/checkpoints/step_000050/state.json     `RunState`, and size and CRC-32 of each other file
    <run folder>/checkpoints/step_000050/megatron/...   Megatron's distributed checkpoint of the actor
    <run folder>/checkpoints/step_000050/critic/...     and of the run's other models

A checkpoint is written into a hidden folder and renamed when complete, so a folder with a checkpoint's name is a whole
checkpoint; `state.json` says whether it is still undamaged. A `latest` file could point to nothing, so the newest
checkpoint is the one with the highest step that passes validation.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dsrl.common.disk import replace_text
from megatron_dsrl.common.step_names import by_step
from megatron_dsrl.config.model import ParallelConfig

FORMAT_VERSION = 1
STATE_FILE = "state.json"
WEIGHTS_FOLDER = "megatron"
_PARTIAL_PREFIX = ".partial_"


@dataclass(frozen=True)
class ProcessLayout:
    """The parallel layout a checkpoint was written in. Random states can be restored only in the same layout."""

    world_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    distributed_optimizer: bool
    virtual_pipeline_stages: int = 1
    layers_in_first_stage: int | None = None
    layers_in_last_stage: int | None = None
    context_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None


def current_layout(parallel: ParallelConfig) -> ProcessLayout:
    """The layout of this process group under these settings."""
    names = {field.name for field in fields(ProcessLayout)}
    return ProcessLayout(world_size=dist.get_world_size(), **parallel.model_dump(include=names))


@dataclass(frozen=True)
class RunState:
    """State of a run after a step."""

    step: int
    """Last completed step."""
    phase: str
    """Name of its phase."""
    sampler: dict[str, Any]
    """The prompt sampler's state."""
    layout: ProcessLayout
    model: dict[str, Any]
    """Shapes and constants of the model, to detect a checkpoint of another model."""
    config: dict[str, Any]
    """The resolved configuration."""


@dataclass(frozen=True)
class SavedState:
    """`state.json`: a run's state, and checksums of the other files."""

    run: RunState
    files: dict[str, tuple[int, int]]
    """Size in bytes and CRC-32 of each other file, by its path in the checkpoint."""

    def write(self, file: Path) -> None:
        """Write the file and flush it to disk."""
        content = asdict(self)
        content = {"format_version": FORMAT_VERSION, "checksum": _checksum(content), **content}
        replace_text(file, json.dumps(content, indent=1))

    @classmethod
    def read(cls, file: Path) -> "SavedState":
        """
        Raises:
            OSError: the file is missing or unreadable.
            ValueError: it is not a valid state of this format.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {content['format_version']}, but this program reads format {FORMAT_VERSION}")
            if content["checksum"] != _checksum({name: content[name] for name in ("run", "files")}):
                raise ValueError("the checksum does not match the content")
            run = content["run"]
            return cls(
                run=RunState(**run | {"layout": ProcessLayout(**run["layout"])}),
                files={name: (size, checksum) for name, (size, checksum) in content["files"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a checkpoint's state: {error!r}") from error


def _checksum(content: dict[str, Any]) -> int:
    """CRC-32 of the content, independent of the order of its fields."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint."""

    folder: Path
    state: RunState

    @property
    def weights_folder(self) -> Path:
        """Folder of the actor's distributed checkpoint."""
        return self.folder / WEIGHTS_FOLDER


def published(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints that this process sees, oldest first."""
    return list(by_step(root).items())


def make_partial(root: Path, step: int, parts: Iterable[str]) -> None:
    """Make an empty `partial_folder`, with a folder for each part."""
    partial = partial_folder(root, step)
    shutil.rmtree(partial, ignore_errors=True)
    for name in parts:
        (partial / name).mkdir(parents=True)


def partial_folder(root: Path, step: int) -> Path:
    """The hidden folder into which the checkpoint of a step is written."""
    return root / f"{_PARTIAL_PREFIX}step_{step:06d}"


def publish(root: Path, saved: SavedState) -> None:
    """Complete the partial folder and give it its name, on disk too. Replaces a checkpoint of the same step."""
    partial, target = partial_folder(root, saved.run.step), root / f"step_{saved.run.step:06d}"
    saved.write(partial / STATE_FILE)
    for folder in filter(Path.is_dir, partial.iterdir()):
        _flush_to_disk(folder)
    _flush_to_disk(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _flush_to_disk(root)


def prune(root: Path, newest_step: int, keep_last: int, keep_every_steps: int | None) -> None:
    """Remove all but the last checkpoints, and those of steps divisible by `keep_every_steps`. Damaged ones after the
    newest step, the one just published, do not count: loading has skipped them."""
    counted = [(step, folder) for step, folder in published(root) if step <= newest_step]
    for step, folder in counted[:-keep_last]:
        if not (keep_every_steps and step % keep_every_steps == 0):
            shutil.rmtree(folder)
    for abandoned in root.glob(f"{_PARTIAL_PREFIX}*"):  # left by a process killed while writing
        shutil.rmtree(abandoned)


def _flush_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
