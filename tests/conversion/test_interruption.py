"""Interrupted and killed conversions."""

import glob
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.conversions import assert_identical, convert, hidden, tensors_of
from tests.support.forked import ForkedProcess
from tests.support.tiny_model import make_tiny_qwen3
from tests.support.tiny_run import processes_left_behind, start_dsrl

PARTIAL_FILES = ".megatron.partial-*/*.distcp"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of 205 MB, which is written long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    make_tiny_qwen3(folder, tied=False, vocab_size=400_000)
    return folder


def files_being_written(target: Path) -> set[str]:
    """Files of unfinished conversions to this folder. Unlike Path.glob, glob.glob tolerates vanishing folders."""
    return set(glob.glob(str(target.parent / PARTIAL_FILES)))


@contextmanager
def conversion_that_writes(source: Path, target: Path) -> Iterator[ForkedProcess]:
    """`dsrl convert` in a separate process, as soon as it has written the beginning of a file."""
    before = files_being_written(target)
    process = start_dsrl("convert", "hf-to-megatron", str(source), str(target))
    try:
        deadline = time.monotonic() + 100
        while files_being_written(target) <= before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        yield process
    finally:
        process.kill()
        process.wait()
        assert processes_left_behind() == []  # which would still hold its lock


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_conversion_leaves_nothing(large, tmp_path, number, status) -> None:
    with conversion_that_writes(large, tmp_path / "out" / "megatron") as process:
        process.send_signal(number)
        assert process.wait(timeout=60) == status
    assert list((tmp_path / "out").iterdir()) == [] and processes_left_behind() == []


def test_what_a_killed_conversion_left_is_removed_by_the_next_one_but_not_that_of_a_running_one(
    large, tmp_path, capsys
) -> None:
    """`kill -9` of one, then one that is stopped, beside which a third is refused before it does any work."""
    target = tmp_path / "out" / "megatron"
    with conversion_that_writes(large, target) as process:
        process.kill()
    left = hidden(target.parent)
    assert len(left) == 2 and not target.exists()

    with conversion_that_writes(large, target) as running:
        running.send_signal(signal.SIGSTOP)
        of_the_running_one = hidden(target.parent)
        assert len(of_the_running_one) == 2 and not set(left) & set(of_the_running_one)
        assert convert("hf-to-megatron", large, target) == 2
        assert "another process is writing to it (.megatron.partial-" in capsys.readouterr().err
        assert sorted(hidden(target.parent)) == sorted(of_the_running_one)
    assert convert("hf-to-megatron", large, target) == 0
    assert hidden(target.parent) == []
    assert convert("megatron-to-hf", target, tmp_path / "back") == 0
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(large))


def test_a_conversion_that_was_killed_between_two_renames_has_not_lost_the_former_target(converted) -> None:
    """The former target had stepped aside, the new one was not there yet."""
    target, partial = converted / "megatron", converted / ".megatron.partial-0123"
    (converted / ".megatron.partial-0123.lock").touch()
    partial.mkdir()
    before = (target / ".metadata").read_bytes()
    target.rename(partial.with_name(partial.name + ".old"))

    assert convert("hf-to-megatron", converted / "hf", target) == 2
    assert (target / ".metadata").read_bytes() == before
    assert hidden(converted) == []
