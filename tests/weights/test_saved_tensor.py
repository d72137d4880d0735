"""Reading what torch.save wrote into reused memory."""

from pathlib import Path

import pytest
import torch

from megatron_dsrl.weights.reused_memory import ReusedMemory, with_own_storage
from megatron_dsrl.weights.saved_tensor import FileSection, read_saved_tensor

TENSORS = {
    "bfloat16": torch.arange(1, 36).view(5, 7).to(torch.bfloat16),
    "scalar": torch.tensor(2.0),
    "columns": torch.arange(1.0, 49.0).view(6, 8)[:, 2:5],
    "transposed": torch.arange(1.0, 13.0).view(3, 4).T,
    "row": torch.arange(1.0, 49.0).view(6, 8)[2],
}


def read(file: Path, start: int, length: int, memory: ReusedMemory) -> torch.Tensor:
    with file.open("rb", buffering=0) as stream:
        return read_saved_tensor(FileSection(stream, start, length), memory)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_from_the_middle_of_a_file_over_an_earlier_one(name, tmp_path) -> None:
    tensor, memory = TENSORS[name], ReusedMemory()
    memory.take((1000,), torch.float32).fill_(7.0)
    for saved in (tensor, with_own_storage(tensor)):
        with (tmp_path / "file").open("wb") as stream:
            stream.write(b"before")
            torch.save(saved, stream)
            length = stream.tell() - 6
            stream.write(b"after")
        memory.free()
        found = read(tmp_path / "file", 6, length, memory)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_every_changed_byte_of_the_values_is_noticed(tmp_path) -> None:
    file = tmp_path / "file"
    torch.save(TENSORS["bfloat16"], file)
    whole = file.read_bytes()
    values = TENSORS["bfloat16"].view(torch.uint8).numpy().tobytes()
    first = whole.index(values)
    for place in range(first, first + len(values)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(Exception, match="CRC-32"):
            read(file, 0, len(whole), ReusedMemory())


@pytest.mark.parametrize("content", [{"a": 1}, [torch.ones(2), torch.ones(3)]])
def test_anything_but_one_tensor_is_refused(content, tmp_path) -> None:
    torch.save(content, tmp_path / "file")
    with pytest.raises(Exception, match="instead of"):
        read(tmp_path / "file", 0, (tmp_path / "file").stat().st_size, ReusedMemory())


def test_a_view_is_saved_without_what_surrounds_it_and_without_a_copy() -> None:
    whole = torch.arange(100.0).view(10, 10)
    part = with_own_storage(whole[2:4])
    assert torch.equal(part, whole[2:4])
    assert part.untyped_storage().nbytes() == 20 * 4 and part.data_ptr() == whole[2:4].data_ptr()


def test_memory_is_used_again_only_after_it_was_freed() -> None:
    memory = ReusedMemory()
    one, two = memory.take((4,), torch.float32), memory.take((2, 3), torch.bfloat16)
    assert one.data_ptr() != two.data_ptr()
    memory.free()
    assert memory.take((2, 2), torch.bfloat16).data_ptr() == one.data_ptr()
    assert memory.take((0, 5), torch.bfloat16).shape == (0, 5)
