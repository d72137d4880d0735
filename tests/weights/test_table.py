"""The tables against the names and shapes of Transformers, of Megatron's local layers, and of Transformer Engine's."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.weights.checkpoint_shapes import whole_shape
from megatron_dsrl.weights.table import TableEntry, WeightTable, weight_table
from tests.support.families import FAMILIES
from tests.support.tiny_model import make_tiny_qwen3

QWEN3_ATTENTION = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
}
QWEN2_ATTENTION = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
}
LLAMA_ATTENTION = QWEN2_ATTENTION - {"self_attention.linear_qkv.bias"}
FEED_FORWARD = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
GROUPED_EXPERTS = {
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.linear_fc1.weight{expert}",
    "mlp.experts.linear_fc2.weight{expert}",
}
TRANSFORMER_ENGINE_LAYERS = {
    # Parameters of a TransformerLayer with Megatron's Transformer Engine specification, experts in grouped products
    "Qwen3 untied": QWEN3_ATTENTION | FEED_FORWARD,
    "Qwen3-MoE": QWEN3_ATTENTION | GROUPED_EXPERTS,
    "Qwen2.5": QWEN2_ATTENTION | FEED_FORWARD,
    "Llama untied": LLAMA_ATTENTION | FEED_FORWARD,
}

# Layers, hidden size, feed-forward size, heads, key/value heads, tied embeddings, and of experts their inner size: what
# the published config.json says. All Qwen3 have 151,936 tokens, heads of dimension 128 and, if any, 128 experts.
QWEN3 = {
    "0.6B": (28, 1024, 3072, 16, 8, True, None),
    "1.7B": (28, 2048, 6144, 16, 8, True, None),
    "4B": (36, 2560, 9728, 32, 8, True, None),
    "8B": (36, 4096, 12288, 32, 8, False, None),
    "14B": (40, 5120, 17408, 40, 8, False, None),
    "32B": (64, 5120, 25600, 64, 8, False, None),
    "30B-A3B": (48, 2048, 6144, 32, 4, False, 768),
    "235B-A22B": (94, 4096, 12288, 64, 4, False, 1536),
}
QWEN25 = {  # with the vocabulary last
    "0.5B": (24, 896, 4864, 14, 2, True, 151_936),
    "7B": (28, 3584, 18944, 28, 4, False, 152_064),
}
LLAMA = {  # also with the vocabulary last
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, False, 128_256),
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, True, 128_256),
    "SmolLM2-135M": (30, 576, 1536, 9, 3, True, 49_152),
}
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PARAMETERS = {  # in billions, as the model cards have them
    "Qwen3-0.6B": 0.6, "Qwen3-1.7B": 1.7, "Qwen3-4B": 4.0, "Qwen3-8B": 8.2, "Qwen3-14B": 14.8, "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5, "Qwen3-235B-A22B": 235, "Qwen2.5-0.5B": 0.49, "Qwen2.5-7B": 7.61,
    "Llama-3.1-8B": 8.03, "Llama-3.2-1B": 1.24, "SmolLM2-135M": 0.135,
}  # fmt: skip


def published_config(name: str) -> PretrainedConfig:
    family, _, size = name.partition("-")
    *sizes, tied, last = LLAMA[name] if name in LLAMA else (QWEN3 if family == "Qwen3" else QWEN25)[size]
    common = dict(zip(SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied}
    if name in LLAMA:
        return LlamaConfig(**common, vocab_size=last, architectures=["LlamaForCausalLM"])
    if family == "Qwen2.5":
        return Qwen2Config(**common, vocab_size=last, architectures=["Qwen2ForCausalLM"])
    common |= {"vocab_size": 151_936, "head_dim": 128}
    if last is None:
        return Qwen3Config(**common, architectures=["Qwen3ForCausalLM"])
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": last, "norm_topk_prob": True}
    return Qwen3MoeConfig(**common, **experts, architectures=["Qwen3MoeForCausalLM"])


def shapes_in_files(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """By the hub's names. Transformers keeps the experts of a layer in two tensors, gate above up in the first."""
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    shapes = {}
    for name, parameter in model.named_parameters():
        prefix, of_experts, fused = name.partition(".experts.")
        if not of_experts:
            shapes[name] = tuple(parameter.shape)
            continue
        experts, rows, columns = parameter.shape
        for part, expert in product(parts[fused], range(experts)):
            shapes[f"{prefix}.experts.{expert}.{part}.weight"] = (rows // len(parts[fused]), columns)
    return shapes


@pytest.mark.parametrize("name", PARAMETERS)
def test_hf_names_and_shapes_of_published_sizes_are_those_of_transformers(tmp_path, name) -> None:
    config = published_config(name)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = weight_table(read_architecture(tmp_path)).hf_shapes()
    assert shapes == shapes_in_files(model)
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.015)


@pytest.mark.parametrize("family", TRANSFORMER_ENGINE_LAYERS)
def test_every_parameter_of_a_transformer_engine_layer_has_a_rule(tmp_path, family) -> None:
    FAMILIES[family](tmp_path)
    table = weight_table(read_architecture(tmp_path))
    prefix = "decoder.layers.{layer}."
    last_names = {rule.megatron[-1].removeprefix(prefix) for rule in table.rules if rule.per_layer}
    assert last_names == TRANSFORMER_ENGINE_LAYERS[family]


def test_fused_norms_are_the_hf_norms_before_the_same_matrix(tmp_path) -> None:
    make_tiny_qwen3(tmp_path, tied=False)
    table = weight_table(read_architecture(tmp_path))

    def hf_names(megatron_name: str) -> list[str]:
        rule = next(rule for rule in table.rules if megatron_name in rule.megatron)
        return [tensor.name for tensor in TableEntry(rule, 3).hf]

    assert hf_names("decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight") == [
        "model.layers.3.input_layernorm.weight"
    ]
    assert hf_names("decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight") == [
        "model.layers.3.post_attention_layernorm.weight"
    ]


def test_entries_come_in_the_order_of_the_model(tmp_path) -> None:
    make_tiny_qwen3(tmp_path, tied=False)
    table: WeightTable = weight_table(read_architecture(tmp_path))
    names = [tensor.name for entry in table.entries() for tensor in entry.hf]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2, 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_in_checkpoints_are_those_that_the_layouts_give(family, tmp_path) -> None:
    FAMILIES[family](tmp_path, vocab_size=101)
    for rule in weight_table(read_architecture(tmp_path)).rules:
        whole = rule.layout.shard([torch.empty(tensor.shape) for tensor in rule.hf], rank=0, size=1)
        assert whole_shape(rule) == tuple(whole.shape), rule.checkpoint_name
