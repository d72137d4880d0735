"""The checkpoints of one run: save, continue from the newest, keep a few.

One thread per rank writes and checksums its files without communication. An asynchronous save returns when every rank
has copied its part, and is published by a later call: the collective parts run in the main thread, so that they cannot
interleave with the collectives of training.
"""

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dsrl.checkpoint.state import (
    STATE_FILE,
    WEIGHTS_FOLDER,
    Checkpoint,
    RunState,
    SavedState,
    make_partial,
    partial_folder,
    prune,
    publish,
    published,
)
from megatron_dsrl.common.checksum import Checksums, changed_file, checksums
from megatron_dsrl.common.collective import broadcast, first_problem, gather, my_share
from megatron_dsrl.common.disk import free_space
from megatron_dsrl.common.errors import UserError

_CLOSE_SECONDS = 60
"""Time limit for a thread that is still writing when a failed run ends."""

StartWrite = Callable[[Path, bool], "WeightsWrite"]
"""Collective; takes an empty folder, and whether to copy the state because training continues before it is written."""


class WeightsWrite(Protocol):
    """A part of a checkpoint, ready to be written; see `megatron_writer.CheckpointWrite`."""

    def write(self) -> Sequence[Path]:
        """Write this rank's files and return their paths. Not collective; runs in a thread. Raises OSError if they
        cannot be written."""

    def finish(self) -> None:
        """Collective, after all ranks have written. Raises OSError if this rank could not write; it still took part in
        all collectives."""


class CheckpointStore:
    """The checkpoints of one run. Methods are collective over all ranks unless they say otherwise."""

    def __init__(
        self,
        root: Path,
        keep_last: int,
        keep_every_steps: int | None,
        report: Callable[[str], None],
        asynchronous: bool = False,
    ) -> None:
        """
        Args:
            root: folder of the checkpoints, shared by all ranks; need not exist yet.
            keep_every_steps: also keep checkpoints of steps divisible by this; None for none.
            report: called on rank 0 with a message about each damaged checkpoint.
            asynchronous: `save` returns before the checkpoint is written; `poll` or `finish` publishes it.
        """
        self._root = root
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        self._report = report
        self._asynchronous = asynchronous
        self._good_step: int | None = None
        """Step of the newest checkpoint known to be good."""
        self._in_flight: Save | None = None

    def save(self, state: RunState, start_write: StartWrite, others: Mapping[str, StartWrite] | None = None) -> None:
        """Publish a checkpoint and remove old ones. An asynchronous save only starts here.

        Waits for a save in flight. Replaces a damaged checkpoint of the same step. Does nothing if this step's
        checkpoint is known to be good: the state is the same, and the only good checkpoint must never be missing.
        Raises UserError, on all ranks, if the folder cannot be written to (full, read-only); for an asynchronous save
        the next call does. Earlier checkpoints are then untouched, and no partial one is left.

        Args:
            state: everything but the models; the same on every rank.
            start_write: prepares the actor's part.
            others: prepare the parts of other models, by folder name; the same names on every rank.
        """
        self.finish()
        if self.has(state.step):
            return
        partial = partial_folder(self._root, state.step)
        parts = {WEIGHTS_FOLDER: start_write, **(others or {})}
        try:
            on_rank_0(lambda: make_partial(self._root, state.step, parts))
            writes = [start(partial / name, self._asynchronous) for name, start in parts.items()]
        except OSError as error:
            raise self._failure(state.step, partial, error) from error
        self._in_flight = Save(state, partial, writes)
        if not self._asynchronous:
            self.finish()

    def has(self, step: int) -> bool:
        """Whether the checkpoint of this step is known to be good. Not collective, but the same on every rank."""
        return step == self._good_step

    def poll(self) -> None:
        """Publish the save in flight if every rank has written its part. Does not wait. Raises UserError like `save`,
        as soon as one rank has failed."""
        if self._in_flight is None:
            return
        outcomes = gather((self._in_flight.is_written(), self._in_flight.problem))
        if all(written for written, _ in outcomes) or any(problem for _, problem in outcomes):
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if any, and publish it. Raises UserError like `save`."""
        save, self._in_flight = self._in_flight, None
        if save is None:
            return
        try:
            files = save.complete()
            on_rank_0(lambda: self._publish(SavedState(run=save.state, files=files)))
        except OSError as error:
            raise self._failure(save.state.step, save.partial, error) from error
        self._good_step = save.state.step

    def close(self) -> None:
        """Give this rank's thread a minute to end. Not collective. An unfinished save is discarded."""
        if self._in_flight is not None:
            self._in_flight.wait(_CLOSE_SECONDS)

    def _failure(self, step: int, partial: Path, error: OSError) -> UserError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return UserError(
            f"the checkpoint of step {step} could not be written to {self._root}{free_space(self._root)}: "
            f"{error}. Earlier checkpoints are untouched; free space or fix the permissions, then start again to "
            "continue from them"
        )

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; None without checkpoints. Damaged ones are reported. Raises UserError, on
        every rank, if all are damaged."""
        folders = broadcast([folder for _, folder in reversed(published(self._root))])
        for folder in folders:
            problem, state = _validate(folder)
            if problem is None:
                assert state is not None
                self._good_step = state.step
                return Checkpoint(folder, state)
            if dist.get_rank() == 0:
                self._report(f"checkpoint {folder} is damaged and ignored: {problem}")
        if folders:
            raise UserError(
                f"all checkpoints in {self._root} are damaged; remove the folder to start over from the first step"
            )
        return None

    def _publish(self, saved: SavedState) -> None:
        """Give a complete checkpoint its name and remove old ones. On rank 0."""
        publish(self._root, saved)
        prune(self._root, saved.run.step, self._keep_last, self._keep_every_steps)


def _validate(folder: Path) -> tuple[str | None, RunState | None]:
    """The problem with a checkpoint, if any, and its state, if readable. Ranks share the reading."""
    try:
        saved = SavedState.read(folder / STATE_FILE)
    except (OSError, ValueError) as error:
        return first_problem(f"{STATE_FILE}: {error}"), None
    problem = changed_file(folder, saved.files, my_share(sorted(saved.files)))
    return first_problem(problem), saved.run


class Save:
    """A save in flight: this rank's thread and its result."""

    def __init__(self, state: RunState, partial: Path, writes: Sequence[WeightsWrite]) -> None:
        self.state = state
        self.partial = partial
        self.problem: str | None = None
        """Error message if this rank's files could not be written."""
        self._writes = writes
        self._defect: BaseException | None = None
        self._checksums: Checksums = {}
        # A daemon thread is not joined at exit, so that a second request to stop ends the process at once.
        self._thread = threading.Thread(target=self._write_and_checksum, name="checkpoint", daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether this rank has written its files, or failed to."""
        return not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for this rank's thread."""
        self._thread.join(seconds)

    def complete(self) -> Checksums:
        """Wait for the thread, write the checkpoint's metadata, and gather the checksums. Collective. Raises OSError if
        the files of some rank could not be written."""
        self.wait()
        if self._defect is not None:
            raise self._defect
        raise_together(self.problem)
        for write in self._writes:
            problem = None
            try:
                write.finish()
            except CheckpointException as error:  # a BaseException; all ranks raise it, rank 0 knows the cause
                problem = "; ".join(str(cause) for cause, _ in error.failures.values()) or str(error)
            except OSError as error:
                problem = str(error)
            raise_together(problem)
        files = {name: entry for share in gather(self._checksums) for name, entry in share.items()}
        names = broadcast(sorted(str(x.relative_to(self.partial)) for x in self.partial.rglob("*") if x.is_file()))
        return files | _checksums_together(self.partial, [name for name in names if name not in files])

    def _write_and_checksum(self) -> None:
        try:
            self._checksums = checksums(self.partial, [file for write in self._writes for file in write.write()])
        except OSError as error:
            self.problem = str(error)
        except BaseException as error:  # raised in the main thread
            self._defect = error


def _checksums_together(folder: Path, names: Sequence[str]) -> Checksums:
    """Checksums of these files; each rank reads a share. Collective."""
    problem, mine = None, {}
    try:
        mine = checksums(folder, [folder / name for name in my_share(names)])
    except OSError as error:
        problem = str(error)
    raise_together(problem)
    return {name: entry for share in gather(mine) for name, entry in share.items()}


def on_rank_0(action: Callable[[], None]) -> None:
    """Run `action` on rank 0; its OSError is raised on all ranks."""
    problem: str | None = None
    try:
        if dist.get_rank() == 0:
            action()
    except OSError as error:
        problem = str(error)
    raise_together(problem)


def raise_together(problem: str | None) -> None:
    """Raise OSError on all ranks if one of them has a problem."""
    if (problem := first_problem(problem)) is not None:
        raise OSError(problem)
