"""Flush written data to disk while more is being written."""

import os
from concurrent.futures import Future, ThreadPoolExecutor

STEP_BYTES = 128 * 2**20
"""Bytes written between two flushes; a flush that is still running is not waited for."""


class DiskFlush:
    """Flushes files in a separate thread, so that the disk is busy from the start and not only at the final fsync.

    This also limits the kernel memory held for unwritten data.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-flush")
        self._running: Future[None] | None = None
        self._written = 0

    def wrote(self, file_descriptor: int, count: int) -> None:
        """Report that `count` bytes were written to a file, which must stay open until `finish`."""
        self._written += count
        if self._written >= STEP_BYTES and (self._running is None or self._running.done()):
            self._written = 0
            if self._running is not None:
                self._running.result()  # raises the error of a failed flush
            self._running = self._thread.submit(os.fdatasync, file_descriptor)

    def finish(self) -> None:
        """Wait for the thread. Each file still needs a final fsync.

        Raises:
            OSError: a flush failed, for example on a full disk.
        """
        self._thread.shutdown()
        if self._running is not None:
            self._running.result()
