"""Checkpoint folders of a run: published whole, validated before use, pruned.

    <run folder>/checkpoints/step_000050/state.json     what `RunState` holds, and size and CRC-32 of every other file
    <run folder>/checkpoints/step_000050/megatron/...   Megatron's distributed checkpoint

A checkpoint is written into a hidden folder beside its place and renamed when it is complete, so that a folder with a
checkpoint's name is a whole checkpoint; `state.json` then tells whether it is still undamaged. There is no `latest`
file that could point at nothing: the newest is the one with the highest step that passes validation.
"""

import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dsrl.checkpoint.state import RunState, SavedState
from megatron_dsrl.errors import UserError

STATE_FILE = "state.json"
WEIGHTS_FOLDER = "megatron"
_PARTIAL_PREFIX = ".partial_"
_NAME = re.compile(r"step_(\d+)")
_READ_BYTES = 16 * 2**20
_TORCH_SAVE_FAILURES = ("PytorchStreamWriter", "inline_container", "iostream error")
"""In messages of the RuntimeError that torch.save raises in place of OSError, on a full disk for example."""


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint."""

    folder: Path
    state: RunState

    @property
    def weights_folder(self) -> Path:
        """What Megatron wrote."""
        return self.folder / WEIGHTS_FOLDER


class CheckpointStore:
    """The checkpoints of one run. Methods are collective over all ranks unless they say otherwise."""

    def __init__(self, root: Path, keep_last: int, keep_every_steps: int | None, report: Callable[[str], None]):
        """
        Args:
            root: folder of the checkpoints; need not exist yet, and must be shared by all ranks.
            keep_last: newest checkpoints to keep.
            keep_every_steps: checkpoints of steps divisible by it are kept for ever; None keeps none.
            report: called on rank 0 with a line about damaged checkpoints.
        """
        self._root = root
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        self._report = report
        self._continued_step: int | None = None

    def save(self, state: RunState, write_weights: Callable[[Path], None]) -> None:
        """Publish a checkpoint, then remove those that are not to be kept.

        A damaged one of the same step is replaced. Nothing is written when `newest` has found the step's checkpoint
        good: the run has not moved since, and the only good checkpoint must at no moment be gone.

        Args:
            state: everything but the actor's part; the same on every rank.
            write_weights: collective; writes the actor's part into an empty folder.

        Raises:
            UserError: the folder cannot be written to (no space, read-only). The checkpoints before are untouched, and
                nothing half-written is left. Ranks raise it together, except for a failure of one rank between
                Megatron's own exchanges: that rank raises at once instead of waiting for the others, whose connection
                to it then breaks.
        """
        if state.step == self._continued_step:
            return
        partial = self._root / f"{_PARTIAL_PREFIX}step_{state.step:06d}"
        try:
            _on_rank_0(lambda: _make_empty(partial / WEIGHTS_FOLDER))
            _write_together(write_weights, partial / WEIGHTS_FOLDER)
            checksums = _checksums_of_all_files(partial)
            _on_rank_0(lambda: self._publish(partial, SavedState(run=state, files=checksums)))
        except OSError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {state.step} could not be written to {self._root}{_free_space(self._root)}: "
                f"{error}. Earlier checkpoints are untouched; free space or mend the permissions, and start again to "
                "continue from them"
            ) from error

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, None if there is no checkpoint at all. Damaged ones are reported by name.

        Raises:
            UserError: on every rank, if there are checkpoints and all are damaged.
        """
        folders = _broadcast([folder for _, folder in reversed(self._published())])
        for folder in folders:
            problem, state = self._validate(folder)
            if problem is None:
                assert state is not None
                self._continued_step = state.step
                return Checkpoint(folder, state)
            if dist.get_rank() == 0:
                self._report(f"checkpoint {folder} is damaged and left out: {problem}")
        if folders:
            raise UserError(
                f"all checkpoints in {self._root} are damaged; remove the folder to start again from the first step"
            )
        return None

    def _published(self) -> list[tuple[int, Path]]:
        """(step, folder), oldest first. This rank's view."""
        if not self._root.is_dir():
            return []
        named = [(_NAME.fullmatch(folder.name), folder) for folder in self._root.iterdir()]
        return sorted((int(match[1]), folder) for match, folder in named if match)

    def _validate(self, folder: Path) -> tuple[str | None, RunState | None]:
        """What is wrong with a checkpoint, or its state. Ranks share the reading."""
        try:
            saved = SavedState.read(folder / STATE_FILE)
        except (OSError, ValueError) as error:
            return _first_problem(f"{STATE_FILE}: {error}"), None
        names = sorted(saved.files)
        problem = None
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            try:
                found = _size_and_checksum(folder / name)
            except OSError as error:
                problem = f"{name}: {error.strerror}"
                break
            if found != saved.files[name]:
                problem = f"{name} is not what was written (size and CRC-32 {found}, should be {saved.files[name]})"
                break
        return _first_problem(problem), saved.run

    def _publish(self, partial: Path, saved: SavedState) -> None:
        """Rank 0."""
        saved.write(partial / STATE_FILE)
        _flush_to_disk(partial / WEIGHTS_FOLDER)
        _flush_to_disk(partial)
        target = self._root / f"step_{saved.run.step:06d}"
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _flush_to_disk(self._root)
        self._prune(saved.run.step)

    def _prune(self, newest_step: int) -> None:
        """Later checkpoints than the one just published are damaged ones, which `newest` has passed over."""
        published = [(step, folder) for step, folder in self._published() if step <= newest_step]
        for step, folder in published[: -self._keep_last]:
            if not (self._keep_every_steps and step % self._keep_every_steps == 0):
                shutil.rmtree(folder)
        for abandoned in self._root.glob(f"{_PARTIAL_PREFIX}*"):  # by a process that was killed while it wrote
            shutil.rmtree(abandoned)


def _write_together(write_weights: Callable[[Path], None], folder: Path) -> None:
    """Write the actor's part; a failure becomes an OSError.

    Megatron's writers report to each other, and all ranks raise CheckpointException, which is no Exception, together.
    Its cause is known to rank 0 only.
    """
    problem: str | None = None
    try:
        write_weights(folder)
    except CheckpointException as error:
        problem = "; ".join(str(cause) for cause, _ in error.failures.values()) or None
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _TORCH_SAVE_FAILURES):
            raise
        raise OSError(f"torch.save: {error}") from error
    if (problem := _first_problem(problem)) is not None:
        raise OSError(problem)


def _free_space(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there)"
    except OSError:
        return ""


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)


def _checksums_of_all_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 by name relative to the folder; each rank reads a share."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = _broadcast(names)
    mine = {name: _size_and_checksum(folder / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    shares: list[dict[str, tuple[int, int]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return {name: entry for share in shares for name, entry in share.items()}


def _size_and_checksum(file: Path) -> tuple[int, int]:
    size = checksum = 0
    with open(file, "rb") as stream:
        while part := stream.read(_READ_BYTES):
            size += len(part)
            checksum = zlib.crc32(part, checksum)
    return size, checksum


def _flush_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_rank_0(action: Callable[[], None]) -> None:
    """An OSError of it is raised on all ranks."""
    problem: str | None = None
    try:
        if dist.get_rank() == 0:
            action()
    except OSError as error:
        problem = str(error)
    if (problem := _first_problem(problem)) is not None:
        raise OSError(problem)


def _first_problem(problem: str | None) -> str | None:
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((each for each in problems if each is not None), None)


def _broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
