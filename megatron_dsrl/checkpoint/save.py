"""A save in flight: one thread per rank writes and checksums its files without communication.

The collective parts run in the main thread, so that they cannot interleave with the collectives of training.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dsrl.checkpoint.state import RunState
from megatron_dsrl.common.checksum import Checksums, checksums
from megatron_dsrl.common.collective import broadcast, first_problem, gather, my_share

StartWrite = Callable[[Path, bool], "WeightsWrite"]
"""Collective; takes an empty folder, and whether to copy the state because training continues before it is written."""


class WeightsWrite(Protocol):
    """A part of a checkpoint, ready to be written; see `megatron_writer.CheckpointWrite`."""

    def write(self) -> Sequence[Path]:
        """Write this rank's files and return their paths. Not collective; runs in a thread.

        Raises:
            OSError: they cannot be written.
        """

    def finish(self) -> None:
        """Collective, after all ranks have written.

        Raises:
            OSError: this rank could not write; it still took part in all collectives.
        """


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
        """Wait for the thread, write the checkpoint's metadata, and gather the checksums. Collective.

        Raises:
            OSError: the files of some rank could not be written.
        """
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
