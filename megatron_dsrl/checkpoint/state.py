"""The state of a run, stored as JSON in its checkpoints."""

import json
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dsrl.common.disk import replace_text
from megatron_dsrl.config.model import ParallelConfig

FORMAT_VERSION = 1


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
