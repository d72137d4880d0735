"""The folders of a run's checkpoints:

    <run folder>/checkpoints/step_000050/state.json     `RunState`, and size and CRC-32 of each other file
    <run folder>/checkpoints/step_000050/megatron/...   Megatron's distributed checkpoint of the actor
    <run folder>/checkpoints/step_000050/critic/...     and of the run's other models

A checkpoint is written into a hidden folder and renamed when complete, so a folder with a checkpoint's name is a whole
checkpoint; `state.json` tells whether it is still undamaged. A `latest` file could point to nothing, so the newest
checkpoint is the one with the highest step that passes validation.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_dsrl.checkpoint.state import RunState, SavedState
from megatron_dsrl.common.step_names import by_step

STATE_FILE = "state.json"
WEIGHTS_FOLDER = "megatron"
_PARTIAL_PREFIX = ".partial_"


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
    """Remove old checkpoints. Damaged ones after `newest_step`, which loading has skipped, do not count.

    Args:
        newest_step: step of the checkpoint just published.
        keep_last: number of newest checkpoints to keep.
        keep_every_steps: also keep checkpoints of steps divisible by this; None for none.
    """
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
