"""What is read from `config.json`, and what is refused."""

import json
from pathlib import Path

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.layout import model_problems, refuse
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import resolve_model_folder

QWEN3_8B = {  # the published config.json, Transformers 4 style
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def write(folder: Path, **changes) -> Path:
    (folder / "config.json").write_text(json.dumps(QWEN3_8B | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "names MistralForCausalLM; supported are Qwen3ForCausalLM, Qwen3"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number, not None"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        ({"architectures": "MistralForCausalLM"}, "names MistralForCausalLM; supported are"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias is not supported"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer, not 0"),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        read_architecture(write(tmp_path, **changes))


def test_defaults_are_those_of_transformers(tmp_path) -> None:
    bare = read_architecture(write(tmp_path, num_key_value_heads=None, head_dim=None, hidden_size=2048))
    assert (bare.num_key_value_heads, bare.head_dim) == (32, 128)
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "head_dim": None, "hidden_size": 2048}
    assert read_architecture(write(tmp_path, **qwen2)).head_dim == 64
    llama = read_architecture(write(tmp_path, **qwen2 | {"architectures": ["LlamaForCausalLM"]}))
    assert (llama.head_dim, llama.rope_theta) == (64, 1e6)


def test_a_byte_order_mark_is_skipped(tmp_path) -> None:
    folder = write(tmp_path)
    (folder / "config.json").write_text((folder / "config.json").read_text(), encoding="utf-8-sig")
    assert read_architecture(folder).hidden_size == 4096


def test_folders_that_are_not_models(tmp_path) -> None:
    with pytest.raises(UserError, match="no config.json"):
        read_architecture(tmp_path)
    with pytest.raises(UserError, match="model.path: no such folder:"):
        resolve_model_folder(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor_parallel_size": 16}, "tensor_parallel_size: the model's 8 key/value heads cannot be split 16 ways"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size: the model's 32 attention heads cannot be split 3 ways"),
        ({"pipeline_parallel_size": 8}, "pipeline_parallel_size: the model's 36 layers cannot be split 8 ways"),
    ],
)
def test_layouts_that_do_not_divide_the_model(tmp_path, layout, message) -> None:
    architecture = read_architecture(write(tmp_path))
    refuse(model_problems(ParallelConfig(tensor_parallel_size=8, pipeline_parallel_size=4), architecture.shape))
    with pytest.raises(UserError, match=message):
        refuse(model_problems(ParallelConfig(**layout), architecture.shape))


def test_vocabulary_padding(tmp_path) -> None:
    architecture = read_architecture(write(tmp_path, vocab_size=101))
    assert [architecture.padded_vocab_size(size) for size in (1, 2, 4)] == [101, 102, 104]
