"""Conversion there and back is bit-identical; what a dtype cannot hold is counted."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_dsrl.commands.convert import DTYPES
from megatron_dsrl.common.checksum import fingerprint
from megatron_dsrl.observability.records import read_starts
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint
from tests.support.conversions import QUERY, VOCAB_SIZE, assert_identical, change_weights, convert, hidden, tensors_of
from tests.support.families import FAMILIES
from tests.support.tiny_model import make_tiny_qwen3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_round_trip_is_bit_identical(tmp_path, family, tensor_parallel_size) -> None:
    """From several bfloat16 files, over chunks for a layout, back into several files."""
    source, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    FAMILIES[family](source, vocab_size=VOCAB_SIZE, dtype=torch.bfloat16, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    companions = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    companions += ("additional_chat_templates/tools.jinja",)
    (source / "additional_chat_templates").mkdir()
    for name in companions:
        (source / name).write_text('{"from": "the source"}')

    assert convert("hf-to-megatron", source, megatron, "--tensor-parallel-size", tensor_parallel_size) == 0
    assert convert("megatron-to-hf", megatron, back, "--file-gigabytes", 1e-4) == 0

    assert_identical(tensors_of(back), tensors_of(source))
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 2
    for folder in (megatron, back):
        for name in companions:
            assert (folder / name).read_text() == '{"from": "the source"}'
    for folder, made_from in ((megatron, source), (back, megatron)):
        (start,) = read_starts(folder)
        assert start["command"] == "convert" and start["source"]["fingerprint"] == fingerprint(made_from)
        assert json.loads((folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(back, dtype="auto").dtype == torch.bfloat16
    assert convert("hf-to-megatron", source, megatron, "--overwrite") == 0  # all of it is a model's
    assert hidden(tmp_path) == []


def test_chunks_are_those_of_the_layout(tmp_path) -> None:
    """At tensor-parallel size 2 the row-parallel matrix is cut along its input, gate and up into two pieces each."""
    make_tiny_qwen3(tmp_path / "hf", tied=False, vocab_size=VOCAB_SIZE)
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron", "--tensor-parallel-size", 2) == 0
    chunks = {
        name: [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]
        for name, stored in MegatronCheckpoint(tmp_path / "megatron")._tensors.items()
    }
    assert chunks["embedding.word_embeddings.weight"] == [((0, 0), (51, 64)), ((51, 0), (50, 64))]
    assert chunks["decoder.layers.mlp.linear_fc2.weight"][2:4] == [
        ((1, 0, 0), (1, 64, 64)),
        ((1, 0, 64), (1, 64, 64)),
    ]
    assert [offsets for offsets, _ in chunks["decoder.layers.mlp.linear_fc1.weight"][:4]] == [
        (0, 0, 0),
        (0, 64, 0),
        (0, 128, 0),
        (0, 192, 0),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_choice_and_verification(tmp_path, capsys, dtype) -> None:
    make_tiny_qwen3(tmp_path / "hf", tied=True, vocab_size=VOCAB_SIZE)
    options = ["--dtype", dtype, "--verify"]
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron", *options[:2]) == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--verify") == 0
    expected = {name: x.to(getattr(torch, dtype)) for name, x in tensors_of(tmp_path / "hf").items()}
    assert_identical(tensors_of(tmp_path / "back"), expected)
    printed = " ".join(capsys.readouterr().out.split())
    assert "verified 46 tensors" in printed and "verified logits of 3 prompts, 72 tokens" in printed


@pytest.fixture
def with_large_value_and_nan(tmp_path: Path) -> Path:
    """A model with two weights beyond float16, in two tensors, and one that is NaN."""
    make_tiny_qwen3(tmp_path / "hf", tied=False, vocab_size=VOCAB_SIZE)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY][0, 0] = 1e6
        tensors[QUERY][0, 1] = torch.nan
        tensors["model.norm.weight"][3] = -1e5

    change_weights(tmp_path / "hf", change)
    return tmp_path


LOST = f"2 values (1 in {QUERY}, 1 in model.norm.weight) beyond the range of float16 (largest number 65504) became inf"
NOT_A_NUMBER = f"the source has NaN or infinite values: 1 value (1 in {QUERY})"


def test_values_that_a_dtype_cannot_hold_are_counted_and_named(with_large_value_and_nan, capsys) -> None:
    home = with_large_value_and_nan
    assert convert("hf-to-megatron", home / "hf", home / "half", "--dtype", "float16") == 0
    printed = capsys.readouterr().out
    assert f"warning: {LOST}" in printed and f"warning: {NOT_A_NUMBER}" in printed
    assert convert("verify", home / "hf", home / "half", "--dtype", "float16") == 2
    assert f"verification failed: {LOST}" in capsys.readouterr().err

    assert convert("hf-to-megatron", home / "hf", home / "same", "--verify") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"logits not compared: {NOT_A_NUMBER}" in printed and "beyond" not in printed
    assert convert("megatron-to-hf", home / "same", home / "back", "--dtype", "float16") == 0
    assert f"warning: {LOST}" in capsys.readouterr().out
