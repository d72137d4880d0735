"""A tensor's memory as bytes."""

import torch

from megatron_dsrl.common.tensor_bytes import bytes_of
from megatron_dsrl.platform.weight_digest import weight_digest


def test_the_bytes_are_those_of_the_tensor_without_a_copy() -> None:
    tensor = torch.arange(6, dtype=torch.int32).view(2, 3)[1:]
    view = bytes_of(tensor)
    assert view.tobytes() == tensor.numpy().tobytes()
    tensor[0, 0] = 7
    assert view[0] == 7
    assert len(bytes_of(torch.empty(0))) == 0


def test_parameters_can_be_offloaded_after_they_were_hashed() -> None:
    parameter = torch.ones(4)
    weight_digest(parameter)
    parameter.untyped_storage().resize_(0)
