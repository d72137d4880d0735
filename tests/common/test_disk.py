"""Failed writes: a full disk is named, and an interrupt stays an interrupt. Files are replaced whole."""

import errno
import io
import os
import stat

import pytest
import torch

from megatron_dsrl.common.disk import remedy, replace_text, replacing, write_result, writing
from megatron_dsrl.common.errors import UserError
from tests.support.disk import files_of_at_most


class Interrupted(io.BytesIO):
    """A file in whose second write a signal arrives."""

    def __init__(self, interrupt: BaseException) -> None:
        super().__init__()
        self._interrupt = interrupt

    def write(self, data) -> int:
        if self.tell():
            raise self._interrupt
        return super().write(data)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_in_the_middle_of_a_tensor_is_not_a_full_disk(tmp_path, interrupt) -> None:
    """torch.save raises a RuntimeError in its place."""
    with pytest.raises(type(interrupt)) as raised, writing(tmp_path / "weights"):
        torch.save(torch.zeros(1000), Interrupted(interrupt))
    assert raised.value is interrupt


def test_a_full_disk_after_an_interrupt_that_was_handled_is_still_a_full_disk(tmp_path) -> None:
    file = tmp_path / "weights"
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with files_of_at_most(5000), pytest.raises(UserError, match="weights could not be written"):
            with writing(file), file.open("wb") as stream:
                torch.save(torch.zeros(10_000), stream)


def test_a_link_stays_and_its_target_is_replaced(tmp_path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    replace_text(link, "after")
    assert link.is_symlink() and target.read_text() == "after"


def test_what_is_not_a_regular_file_is_written_to(tmp_path) -> None:
    """Such as /dev/stdout, which root could replace."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_result(pipe, "text")
    assert os.read(reader, 9) == b"text" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_a_full_disk_names_the_file_and_leaves_it_as_it_was(tmp_path) -> None:
    file = tmp_path / "page"
    file.write_text("before")
    with files_of_at_most(100), pytest.raises(OSError) as raised, replacing(file) as stream:
        stream.write(b"x" * 10_000)
        stream.flush()
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(file))
    assert str(raised.value).endswith(f"'{file}'")
    assert remedy(raised.value) == "free space, then run the command again"
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_a_file_instead_of_a_folder_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as raised:
        write_result(tmp_path / "file" / "page", "text")
    assert raised.value.filename == str(tmp_path / "file") and remedy(raised.value) == "correct the path"
