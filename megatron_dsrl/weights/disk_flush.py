"""Bring written data to the disk while more is being written."""

import os
from concurrent.futures import Future, ThreadPoolExecutor

STEP_BYTES = 128 * 2**20
"""Written between two flushes of one file; a flush that still runs is not waited for."""


class DiskFlush:
    """Flushes files in a thread of its own, so that the disk works from the beginning and not only at the final fsync.

    It also keeps the memory that the kernel holds for unwritten data small.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-flush")
        self._running: Future | None = None
        self._written = 0

    def wrote(self, file_descriptor: int, count: int) -> None:
        """Say that bytes were written to a file, which must stay open until `finish`."""
        self._written += count
        if self._written >= STEP_BYTES and (self._running is None or self._running.done()):
            self._written = 0
            if self._running is not None:
                self._running.result()  # a disk error must not be lost
            self._running = self._thread.submit(os.fdatasync, file_descriptor)

    def finish(self) -> None:
        """Wait for the thread. The files still need their own fsync.

        Raises:
            OSError: a flush failed, such as for lack of space.
        """
        self._thread.shutdown()
        if self._running is not None:
            self._running.result()
