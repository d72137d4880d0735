"""`convert verify`, and damage to a checkpoint that every reader finds."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.conversion.logits import _megatron_logits
from megatron_dsrl.conversion.work import conversion_processes
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.weights.table import weight_table
from tests.support.conversions import VOCAB_SIZE, assert_identical, convert, hidden, tensors_of
from tests.support.tiny_model import make_tiny_qwen3


def flip_a_bit(file: Path, tensor: Tensor) -> None:
    """In the middle of a tensor of the file."""
    content = bytearray(file.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 1001] ^= 1
    file.write_bytes(content)


def test_verify_names_the_tensor_with_a_flipped_bit(converted, capsys) -> None:
    assert convert("verify", converted / "hf", converted / "megatron") == 0
    weights = tensors_of(converted / "hf")["model.layers.2.mlp.down_proj.weight"]
    flip_a_bit(converted / "hf" / "model.safetensors", weights)

    capsys.readouterr()
    assert convert("verify", converted / "hf", converted / "megatron") == 2
    message = capsys.readouterr().err
    assert "1 tensor differs" in message
    assert "model.layers.2.mlp.down_proj.weight: SHA-256" in message and "1 of 8192 elements" in message


def test_verify_names_a_different_models_tensors(converted, capsys) -> None:
    make_tiny_qwen3(converted / "other", tied=False, vocab_size=VOCAB_SIZE, seed=1)
    assert convert("verify", converted / "other", converted / "megatron") == 2
    message = capsys.readouterr().err
    assert "47 tensors differ" in message and "model.embed_tokens.weight" in message and "and 37 more" in message


def test_a_flipped_bit_in_a_checkpoint_is_found_without_its_source(converted, capsys) -> None:
    """By everything that reads the weights; the layout of two chunks per tensor is read by another path."""
    target = converted / "megatron"
    convert("hf-to-megatron", converted / "hf", target, "--overwrite", "--tensor-parallel-size", 2)
    weights = tensors_of(converted / "hf")["model.layers.2.mlp.down_proj.weight"]
    flip_a_bit(target / "__0_0.distcp", weights[:, :64].contiguous())

    capsys.readouterr()
    damaged = "__0_0.distcp is damaged: the chunk of decoder.layers.mlp.linear_fc2.weight at [2, 0, 0] cannot be read: "
    damaged += "its CRC-32 differs from the one that was stored with it"
    assert convert("megatron-to-hf", target, converted / "back") == 2
    assert damaged in capsys.readouterr().err
    assert convert("verify", converted / "hf", target) == 2
    assert damaged in capsys.readouterr().err
    with conversion_processes(), pytest.raises(UserError, match=re.escape(damaged)):
        _megatron_logits(target, architecture := read_architecture(target), weight_table(architecture), [[1, 2]])


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_changed_index_file_is_found(converted, capsys, name) -> None:
    file = converted / "megatron" / name
    file.write_bytes(file.read_bytes() + b" ")
    assert convert("megatron-to-hf", converted / "megatron", converted / "back") == 2
    assert f"megatron is damaged: {name} has changed (size and CRC-32 are" in capsys.readouterr().err


def test_checkpoints_written_without_checksums_are_read(converted) -> None:
    """torch.save can leave them out."""
    torch.serialization.set_crc32_options(False)
    try:
        assert convert("hf-to-megatron", converted / "hf", converted / "without") == 0
    finally:
        torch.serialization.set_crc32_options(True)
    assert convert("megatron-to-hf", converted / "without", converted / "back") == 0
    assert_identical(tensors_of(converted / "back"), tensors_of(converted / "hf"))


def test_damaged_shard(converted, capsys) -> None:
    shard = converted / "megatron" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100_000])
    assert convert("megatron-to-hf", converted / "megatron", converted / "back") == 2
    assert "__0_0.distcp is damaged: the chunk of decoder.layers" in capsys.readouterr().err
    assert not (converted / "back").exists() and hidden(converted) == []
