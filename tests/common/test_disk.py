"""Failed writes: a full disk is named, and an interrupt stays an interrupt."""

import io

import pytest
import torch

from megatron_dsrl.common.disk import writing
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
