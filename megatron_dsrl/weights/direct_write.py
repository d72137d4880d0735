"""Write large files past the page cache, while the next bytes are being prepared.

A buffered write copies into new pages, which costs the kernel more than the copy itself and fills its memory with data
that nobody reads soon. Here bytes are collected in a few reused buffers, and threads write full ones straight to the
disk (O_DIRECT). What does not fill a buffer goes through the page cache, as does everything on a file system without
O_DIRECT.
"""

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

BLOCK_BYTES = max(4096, mmap.PAGESIZE)
"""Direct writes begin and end at multiples of it, in the file and in memory."""
BUFFER_BYTES = 8 * 2**20
THREADS = 2
"""Writes under way at a time."""
FLUSH_BYTES = 128 * 2**20
"""Bytes left to the page cache between two flushes, so that the disk is busy before the final fsync."""


class DirectFile:
    """An existing file, open for writing. Threads may write to it at the same time.

    Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY)
        self._direct: int | None = None
        self._direct_works = True
        self._unflushed = 0
        with suppress(OSError):  # not on this file system
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)

    def write(self, buffer: memoryview, start: int, offset: int) -> None:
        """Write `buffer[start:]` to the file, from `offset` on. The buffer begins at a page of memory that belongs to a
        multiple of `BLOCK_BYTES` in the file; it is written directly if it has `BUFFER_BYTES`."""
        end = len(buffer)
        if end == BUFFER_BYTES and self._direct is not None and self._direct_works:
            aligned = -(-start // BLOCK_BYTES) * BLOCK_BYTES
            try:
                _write_all(self._direct, buffer[aligned:], offset + aligned - start)
                end = aligned
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct_works = False
        _write_all(self._descriptor, buffer[start:end], offset)
        self._unflushed += end - start
        if self._unflushed >= FLUSH_BYTES:
            self._unflushed = 0
            os.fdatasync(self._descriptor)

    def flush(self) -> None:
        """Have everything written on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it without flushing."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)


class DirectWriter:
    """Writes runs of bytes to files, each run in order. Used by one thread.

    A context manager: on exit everything written is on disk, unless the block has failed. Leaving it raises OSError if
    a write failed.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="direct-write")
        self._buffers = [memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(THREADS + 1)]
        self._writes: list[Future[None] | None] = [None] * len(self._buffers)
        self._current = 0
        self._files: list[DirectFile] = []
        self._file: DirectFile | None = None
        self._start = self._fill = self._offset = 0
        """The current buffer holds bytes from `_start` to `_fill`, which belong to the file at `_offset`."""

    def open(self, path: Path) -> DirectFile:
        """An existing file to write to; closed on exit."""
        self._files.append(DirectFile(path))
        return self._files[-1]

    def write(self, file: DirectFile, offset: int, data: memoryview) -> None:
        """Copy one-dimensional bytes for a file from `open`; the caller may change them afterwards. Raises OSError if
        an earlier write failed."""
        done = 0
        while done < len(data):
            if file is not self._file or offset + done != self._offset + self._fill - self._start:
                self._submit()
                self._file, self._offset = file, offset + done
                self._start = self._fill = self._offset % BLOCK_BYTES
            count = min(len(data) - done, BUFFER_BYTES - self._fill)
            self._buffers[self._current][self._fill : self._fill + count] = data[done : done + count]
            self._fill += count
            done += count
            if self._fill == BUFFER_BYTES:
                self._submit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._submit()
                for index in range(len(self._writes)):
                    self._wait(index)
                for file in self._files:
                    file.flush()
        finally:
            self._threads.shutdown(cancel_futures=True)
            for file in self._files:
                file.close()

    def _submit(self) -> None:
        """Start writing the current buffer, and go on to the next one, at the same place in the same file."""
        if self._file is not None and self._fill > self._start:
            buffer = self._buffers[self._current][: self._fill]
            self._writes[self._current] = self._threads.submit(self._file.write, buffer, self._start, self._offset)
            self._current = (self._current + 1) % len(self._buffers)
            self._offset += self._fill - self._start
            self._start = self._fill = self._offset % BLOCK_BYTES
            self._wait(self._current)

    def _wait(self, index: int) -> None:
        """Wait until a buffer is free."""
        write, self._writes[index] = self._writes[index], None
        if write is not None:
            write.result()


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
