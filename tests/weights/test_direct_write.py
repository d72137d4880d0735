"""Runs of bytes written past the page cache, and on file systems where that is not possible."""

import errno
import os
import random

import pytest

from megatron_dsrl.weights.direct_write import BUFFER_BYTES, DirectWriter
from tests.support.disk import files_of_at_most

SIZE = 4 * BUFFER_BYTES + 1234


@pytest.fixture(params=["direct", "not offered", "refused by the first write"])
def file_system(request, monkeypatch) -> None:
    """What the file system makes of O_DIRECT."""
    refused, open_file, write = errno.EINVAL, os.open, os.pwrite
    direct = set()

    def open_or_refuse(path, flags, *args, **kwargs) -> int:
        if request.param == "not offered" and flags & os.O_DIRECT:
            raise OSError(refused, "refused")
        descriptor = open_file(path, flags, *args, **kwargs)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def write_or_refuse(descriptor, *args) -> int:
        if request.param == "refused by the first write" and descriptor in direct:
            raise OSError(refused, "refused")
        return write(descriptor, *args)

    monkeypatch.setattr(os, "open", open_or_refuse)
    monkeypatch.setattr(os, "pwrite", write_or_refuse)


def test_every_byte_arrives_at_its_place_and_nothing_else_changes(file_system, tmp_path) -> None:
    """Two files; runs that begin anywhere, continue, jump, and leave gaps; the memory is changed after each write."""
    paths = [tmp_path / "a", tmp_path / "b"]
    contents = [bytearray(random.Random(seed).randbytes(SIZE)) for seed in (1, 2)]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    runs = [(0, 0, 1), (0, 1, 70_000), (0, 70_001, 2 * BUFFER_BYTES), (1, 4_095, 4_099), (1, 8_194, BUFFER_BYTES)]
    runs += [(0, SIZE - 5, 5), (1, 2 * BUFFER_BYTES, SIZE - 2 * BUFFER_BYTES), (0, 3 * BUFFER_BYTES - 9, 700)]
    with DirectWriter() as writer:
        files = [writer.open(path) for path in paths]
        for number, (file, start, length) in enumerate(runs):
            data = bytearray(random.Random(100 + number).randbytes(length))
            contents[file][start : start + length] = data
            writer.write(files[file], start, memoryview(data))
            data[:] = bytes(length)
    assert [path.read_bytes() for path in paths] == contents


@pytest.mark.parametrize("limit", [100, BUFFER_BYTES, 3 * BUFFER_BYTES])
def test_a_failed_write_is_raised_at_the_latest_at_the_end(tmp_path, limit) -> None:
    (tmp_path / "a").touch()
    with files_of_at_most(limit), pytest.raises(OSError) as failure, DirectWriter() as writer:
        writer.write(writer.open(tmp_path / "a"), 0, memoryview(bytes(SIZE)))
    assert failure.value.errno == errno.EFBIG
